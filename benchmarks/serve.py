"""`ltmp serve` under load and with malformed requests, from a second process, over 127.0.0.1 only.

    python benchmarks/serve.py load --seconds 60 --connections 32
    python benchmarks/serve.py malformed --requests 1000

`load` keeps every connection busy with generated JPEGs and compares images/s with calling the same model directly, in
batches of the service's size, with and without decoding. `malformed` sends broken requests, generated here and by
Schemathesis, and reports statuses and the server's memory. Both build the model with random weights and thresholds
calibrated for the target share; the cost of an image does not depend on how good the weights are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ltmp
from ltmp.data import eval_transform
from ltmp.learning import calibrate
from ltmp.serve import Deployment, Limits
from ltmp.serve.answers import answer, prepare


def jpeg(seed: int, size: tuple[int, int]) -> bytes:
    """A photograph-like image: large smooth patches, some noise."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(int) + noise.integers(-12, 13, (size[1], size[0], 1))
    file = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@cache
def png(body: bytes) -> bytes:
    """The same image as a small PNG."""
    file = BytesIO()
    Image.open(BytesIO(body)).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


def build(args: argparse.Namespace, folder: Path, bodies: list[bytes]) -> Any:
    """The attached model; its weights and thresholds are saved in `folder`."""
    torch.manual_seed(0)
    model = timm.create_model(args.model).eval()
    save_file(model.state_dict(), folder / "model.safetensors")
    transform = eval_transform(model)
    images = torch.stack([transform(Image.open(BytesIO(body)).convert("RGB")) for body in bodies])
    ltmp.attach(model)
    calibrate(model, images, args.share)
    ltmp.save(model, folder / "thresholds.safetensors", model_name=args.model)
    return model


@contextmanager
def server(args: argparse.Namespace, folder: Path, *more: str) -> Iterator[tuple[str, int, int]]:
    """Run `ltmp serve`; yields host, port and process id. It must exit with 0 when terminated."""
    files = ["--weights", folder / "model.safetensors", "--thresholds", folder / "thresholds.safetensors"]
    # a short timeout, because malformed requests make the server wait for the rest of them
    options = ["--port", "0", "--device", args.device, "--read-timeout", "1" if args.what == "malformed" else "10"]
    command = [sys.executable, "-m", "ltmp.cli", "serve", *options, *more, *map(str, files)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            host, port = process.stdout.readline().split("http://")[1].split(" ")[0].split(":")
            # answers once the model has run its first batches
            with urllib.request.urlopen(f"http://{host}:{port}/readyz", timeout=300):
                yield host, int(port), process.pid
            process.terminate()
            assert process.wait(60) == 0, (folder / "log").read_text()
        finally:
            process.kill()


def post(body: bytes, content_type: str = "image/jpeg") -> bytes:
    head = (
        f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def client(host: str, port: int, requests: list[bytes], end: float) -> list[tuple[int, float]]:
    """Status and seconds of each request of one kept-alive connection."""
    reader, writer = await asyncio.open_connection(host, port)
    results = []
    while (start := time.perf_counter()) < end:
        writer.write(requests[len(results) % len(requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]
        await reader.readexactly(int(length))
        results.append((int(head.split(b" ")[1]), time.perf_counter() - start))
    writer.close()
    return results


async def load(host: str, port: int, args: argparse.Namespace, bodies: list[bytes]) -> dict[str, Any]:
    """Throughput and latency, with every connection sending its next image as soon as the last is answered."""
    requests = [post(body) for body in bodies]
    orders = [random.Random(seed).sample(requests, len(requests)) for seed in range(args.connections)]
    start = time.perf_counter()
    results = await asyncio.gather(*(client(host, port, order, start + args.seconds) for order in orders))
    seconds = time.perf_counter() - start
    times = sorted(1e3 * elapsed for connection in results for _, elapsed in connection)
    return {
        "connections": args.connections,
        "seconds": round(seconds, 1),
        "statuses": dict(Counter(status for connection in results for status, _ in connection)),
        "images/s": round(len(times) / seconds, 1),
        "p50 ms": round(statistics.median(times), 1),
        "p99 ms": round(times[int(0.99 * len(times))], 1),
        "max ms": round(times[-1], 1),
    }


def directly(model: Any, bodies: list[bytes], args: argparse.Namespace) -> dict[str, float]:
    """Images per second of direct calls in batches, from tensors and from JPEGs decoded in the same thread."""
    torch.set_num_threads(args.threads)
    deployment, pixels = Deployment(model, device=args.device), Limits().max_pixels
    bodies = (bodies * (Limits().max_batch // len(bodies) + 1))[: Limits().max_batch]
    images = [prepare(deployment.transform, deployment.mode, pixels, body) for body in bodies]
    calls = {
        "model images/s": lambda: answer(deployment, images),
        "decode and model images/s": lambda: answer(
            deployment, [prepare(deployment.transform, deployment.mode, pixels, body) for body in bodies]
        ),
    }
    result = {}
    with deployment.running():
        for name, call in calls.items():
            call()
            times = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            result[name] = round(len(bodies) / statistics.median(times), 1)
    return result


def malformed(seed: int, good: bytes) -> bytes:
    """One broken request, determined by the seed; it never reaches the model."""
    pick = random.Random(seed)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + pick.randbytes(8) + b"\x08\x02\0\0\0" + pick.randbytes(40)
    # a PNG, because its checksums detect any change; a JPEG with changed bytes may still decode
    flipped = bytearray(png(good))
    for _ in range(pick.randint(1, 200)):
        flipped[pick.randrange(len(flipped))] = pick.randrange(256)
    cut = good[: pick.randrange(len(good))]
    huge = Image.new("L", (12_000, 12_000))
    file = BytesIO()
    if seed % 50 == 0:
        huge.save(file, "PNG")
    choices = [
        lambda: pick.randbytes(pick.randint(1, 300)),
        lambda: post(b""),
        lambda: post(pick.randbytes(pick.randint(1, 50_000)), pick.choice(("image/png", "image/webp", "image/gif"))),
        lambda: post(cut),
        lambda: post(bytes(flipped), "image/png"),
        lambda: post(bomb, "image/png"),
        lambda: post(file.getvalue(), "image/png"),
        lambda: post(good, pick.choice(("text/html", "application/json", "multipart/form-data", "\x7f", "image/tiff"))),
        lambda: post(good).replace(b"/v1/predict", b"/v1/predict?top_k=" + str(pick.choice((-1, 0, 10**9))).encode()),
        lambda: post(good).replace(b"/v1/predict", b"/" + pick.choice((b"../../etc/passwd", b"%00", b"v1/predict/x"))),
        lambda: post(good).replace(b"POST", pick.choice((b"GET", b"PUT", b"BREW", b"TRACE"))),
        lambda: post(good).replace(b"content-length: ", b"content-length: 99"),
        lambda: post(good).replace(b"content-length: ", b"content-length: -"),
        lambda: post(good).replace(b"content-type", b"content-type\0"),
        lambda: post(good).replace(b"content-length", b"transfer-encoding: chunked\r\nx"),
        lambda: post(good).replace(b"host: x", b"x: " + b"y" * 70_000),
        lambda: post(good)[: pick.randrange(60)],
    ]
    return pick.choice(choices)()


def send(host: str, port: int, request: bytes) -> str:
    """Send a request and nothing more; returns the status, "reset" or "closed"."""
    with socket.create_connection((host, port), timeout=60) as connection:
        try:
            connection.sendall(request)
            answer = connection.recv(65536)
        except (ConnectionError, BrokenPipeError):
            return "reset"
    return answer[9:12].decode("latin1") or "closed"


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def abuse(host: str, port: int, pid: int, args: argparse.Namespace, good: bytes) -> dict[str, Any]:
    """Statuses, and memory after each quarter of the requests; an extra first round only warms up the allocator."""
    statuses: Counter[str] = Counter()
    memory = []
    for quarter in range(-1, 4):
        requests = [malformed(quarter * args.requests + number, good) for number in range(args.requests // 4)]
        with ThreadPoolExecutor(16) as pool:
            counts = Counter(pool.map(lambda request: send(host, port, request), requests))
        if quarter >= 0:
            statuses += counts
        memory.append(round(resident(pid), 1))
    url = f"http://{host}:{port}/openapi.json"
    options = ["--max-examples", "50", "--exclude-checks", "positive_data_acceptance", "--no-color"]
    command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", url, *options]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    report = [line.strip("= ") for line in done.stdout.splitlines() if "generated" in line or "issues" in line]
    after = send(host, port, post(good))
    return {
        "statuses": dict(sorted(statuses.items())),
        "5xx": sum(count for status, count in statuses.items() if status.startswith("5")),
        "MiB after warming up and each quarter": memory,
        "schemathesis": report,
        "MiB after schemathesis": round(resident(pid), 1),
        "a good request afterwards": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "malformed"))
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--share", type=float, default=0.55, help="share of the dense FLOPs")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of direct calls, for medians")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="width and height of the JPEGs in pixels")
    args = parser.parse_args()
    bodies = [jpeg(seed, tuple(args.size)) for seed in range(16)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build(args, folder, bodies)
        with server(args, folder) as (host, port, pid):
            if args.what == "load":
                result = asyncio.run(load(host, port, args, bodies))
            else:
                result = abuse(host, port, pid, args, bodies[0])
        if args.what == "load":
            result |= directly(model, bodies, args)
    print(json.dumps({"model": args.model, "threads": args.threads, **result}, indent=2))


if __name__ == "__main__":
    main()
