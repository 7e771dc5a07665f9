"""`ltmp serve` with malicious clients beside honest ones, over 127.0.0.1 only; stops by itself.

    python benchmarks/serve_hostile.py --seconds 60 --timeout 5

Two clients keep sending progressive JPEGs of 20,000 empty scans; eight request pages and never read them; with
`--crumbs 16`, sixteen send bodies in chunks of one byte. Each starts again when it is disconnected. Honest clients send
photograph-like JPEGs, first alone and then beside the malicious ones. They must all be answered with 200, 99 % of them
within the service's timeout. At the end the service is terminated.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serve import build, client, jpeg, post, server

SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00\x00"
"""A scan of one component of a progressive JPEG that changes nothing."""


def endless(scans: int = 20_000, side: int = 3000) -> bytes:
    """A JPEG that takes more than a minute to decode."""
    file = BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(file, "JPEG", progressive=True)
    return file.getvalue()[:-2] + SCAN * scans + b"\xff\xd9"


async def repeat(attack: Any, host: str, port: int, end: float) -> int:
    """Repeat an attack until `end`; returns how often the client was disconnected or answered."""
    times = 0
    while time.perf_counter() < end:
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
            await asyncio.wait_for(attack(host, port), end - time.perf_counter())
        times += 1
        await asyncio.sleep(0.01)
    return times


async def send_endless(host: str, port: int, body: bytes) -> None:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(post(body))
        await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


async def never_read(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port, limit=1024)
    # from here on, nothing is read from the socket
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    try:
        while True:
            writer.write(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 50)
            await writer.drain()
    finally:
        writer.transport.abort()


async def send_crumbs(host: str, port: int) -> None:
    _, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"1\r\nx\r\n" * 10_000)
            await writer.drain()
    finally:
        writer.transport.abort()


async def honest(host: str, port: int, args: argparse.Namespace, requests: list[bytes], end: float) -> dict[str, Any]:
    """Statuses and latency of clients that send their next image as soon as the last is answered."""
    orders = [random.Random(seed).sample(requests, len(requests)) for seed in range(args.connections)]
    results = await asyncio.gather(*(client(host, port, order, end) for order in orders))
    times = sorted(elapsed for connection in results for _, elapsed in connection)
    return {
        "statuses": dict(Counter(status for connection in results for status, _ in connection)),
        "p50 s": round(statistics.median(times), 2),
        "p99 s": round(times[int(0.99 * len(times))], 2),
        "max s": round(times[-1], 2),
    }


async def compare(host: str, port: int, args: argparse.Namespace, bodies: list[bytes]) -> dict[str, Any]:
    """Honest clients alone, and beside hostile ones."""
    bomb, requests = endless(), [post(body) for body in bodies]
    alone = await honest(host, port, args, requests, time.perf_counter() + args.seconds / 4)
    end = time.perf_counter() + args.seconds
    attacks = {
        "endless JPEGs": [lambda host, port: send_endless(host, port, bomb)] * 2,
        "silent readers": [never_read] * 8,
        "bodies in crumbs": [send_crumbs] * args.crumbs,
    }
    hostile = {
        name: [asyncio.ensure_future(repeat(attack, host, port, end)) for attack in clients]
        for name, clients in attacks.items()
    }
    beside = await honest(host, port, args, requests, end)
    tries = {name: sum(await asyncio.gather(*tasks)) for name, tasks in hostile.items()}
    return {"honest clients": args.connections, "alone": alone, "beside hostile ones": beside, "hostile tries": tries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--share", type=float, default=0.55, help="share of the dense FLOPs")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=32, help="number of honest clients")
    parser.add_argument("--crumbs", type=int, default=0, help="number of clients that send one-byte chunks")
    parser.add_argument("--timeout", type=float, default=5, help="of the service, in seconds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.what = "hostile"
    bodies = [jpeg(seed, (500, 375)) for seed in range(16)]
    with tempfile.TemporaryDirectory() as name:
        build(args, Path(name), bodies)
        with server(args, Path(name), "--timeout", str(args.timeout)) as (host, port, _pid):
            result = asyncio.run(compare(host, port, args, bodies))
            stop = time.perf_counter()
        result["seconds to stop"] = round(time.perf_counter() - stop, 1)
    print(json.dumps({"model": args.model, "threads": args.threads, "timeout": args.timeout, **result}, indent=2))
    beside = result["beside hostile ones"]
    if beside["p99 s"] >= args.timeout or set(beside["statuses"]) != {200}:
        raise SystemExit("honest clients were not served in time")


if __name__ == "__main__":
    main()
