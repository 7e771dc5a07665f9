"""`ltmp predict` on 200 malicious files, and on as many members and rows of archives: memory, time, nothing lost.

    python benchmarks/predict_hostile.py

Some good images are mixed in. Every image must be scored, or listed with its name and a reason, in one run that ends by
itself. Memory is the largest peak of a single process (VmHWM), and the largest total of all processes, sampled every
20 ms: with shared pages counted once (PSS), and as the sum of resident memory. Linux only.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, PngImagePlugin
from serve_hostile import endless

from predict import jpeg, tiny_model

Bytes = Callable[[random.Random], bytes]


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of black rows, of which it holds at most half a gigabyte."""
    packer, row = zlib.compressobj(), bytes(3 * width + 1)
    rows = b"".join(packer.compress(row) for _ in range(min(height, 520_000_000 // len(row)))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def png_of_texts() -> bytes:
    """A small PNG with a comment that decompresses to 200 MB."""
    plain = saved(Image.new("RGB", (8, 8)), "PNG")
    return plain[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)) + plain[33:]


def tiff_of_tags(draw: random.Random) -> bytes:
    """A TIFF whose tags claim to hold 2^31 values."""
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 2**31, 8), (273, 4, 2**31, draw.randrange(2**31))]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)


def cut(whole: bytes) -> Bytes:
    """The file, truncated at a random place."""
    return lambda draw: whole[: draw.randrange(1, len(whole))]


def flipped(whole: bytes) -> Bytes:
    """The file, with 20 random bytes overwritten."""

    def make(draw: random.Random) -> bytes:
        data = bytearray(whole)
        for _ in range(20):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)

    return make


@cache
def hostile_bytes() -> dict[str, Bytes]:
    """Kinds of data that are no valid image, or one that is too expensive, by what is wrong with them."""
    small, comment = Image.effect_noise((64, 64), 50).convert("RGB"), PngImagePlugin.PngInfo()
    comment.add_text("x", "y" * 100_000)
    frames = [Image.new("P", (64, 64), color) for color in range(200)]
    bomb, texts, most = endless(side=1000), png_of_texts(), png_of_size(13_000, 13_000)
    animation = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    large, high, stripe = png_of_size(30_000, 30_000), png_of_size(3, 2**31 - 1), png_of_size(60_000, 4)
    whole = {kind: saved(small, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM")}
    return {
        "empty": lambda draw: b"",
        "text": lambda draw: b"<html>" * draw.randrange(1, 1000),
        "noise": lambda draw: draw.randbytes(draw.randrange(1, 100_000)),
        "zeros": lambda draw: bytes(20_000_000),
        "endless": lambda draw: bomb,
        "texts": lambda draw: texts,
        "most": lambda draw: most,
        "large": lambda draw: large,
        "high": lambda draw: high,
        "stripe": lambda draw: stripe,
        "tags": tiff_of_tags,
        "frames": lambda draw: animation,
        "comment": lambda draw: saved(small, "PNG", pnginfo=comment),
        **{f"cut {kind}": cut(data) for kind, data in whole.items()},
        **{f"flipped {kind}": flipped(data) for kind, data in whole.items()},
    }


NAMES = (
    "{n}.jpg",
    "\x1b[31m{n}.png",
    "={n}.png",
    "o[/red]{n}.webp",
    "{{1}}{n}.jpg",
    "x\r\n{n}.gif",
    "n" * 240 + "{n}.tif",
)


def named(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`count` hostile images with hostile names, and a good image after every tenth."""
    draw, kinds = random.Random(seed), list(hostile_bytes().values())
    for number in range(count):
        yield NAMES[number % len(NAMES)].format(n=f"{number:04d}"), kinds[number % len(kinds)](draw)
        if number % 10 == 9:
            yield f"good{number:04d}.jpg", jpeg(number, 64)


def write_folder(root: Path, count: int) -> tuple[Path, int]:
    """Write a folder of hostile files, devices and links; also returns how many images must be reported."""
    folder = root / "images"
    folder.mkdir()
    for name, data in named(count):
        (folder / name.replace("/", "")).write_bytes(data)
    os.mkfifo(folder / "pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop").symlink_to(".")
    for name, size in (("sparse.png", 200 * 10**9), ("half.jpg", 5 * 10**8), ("most.tif", 10**9)):
        with (folder / name).open("wb") as file:
            file.truncate(size)
    return folder, len([path for path in folder.iterdir() if path.name != "loop"])


def write_tar(path: Path, count: int, seed: int) -> int:
    """Write a tar of hostile members and damaged headers; returns how many members have the name of an image."""
    with path.open("wb") as file:
        members = 0
        for name, data in named(count, seed):
            info = tarfile.TarInfo(name.replace("\n", ""))
            info.size = len(data)
            file.write(info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512))
            members += 1
        for name, kind in (("/etc/link.png", tarfile.LNKTYPE), ("s.png", tarfile.SYMTYPE), ("f.png", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "nowhere.png"
            file.write(info.tobuf())
        vast = bytearray(tarfile.TarInfo("vast.png").tobuf())
        vast[124:136] = b"\x80" + (2**80).to_bytes(11, "big")
        vast[148:156] = b"%06o\0 " % (sum(vast[:148]) + sum(vast[156:512]) + 8 * 32)
        file.write(vast)
        file.write(bytes(1024))
    return members


def write_shards(root: Path, count: int) -> tuple[list[Path], int]:
    """Write two tars and a Parquet file of hostile members and rows, and files that are neither."""
    tars = [root / "a.tar", root / "b.tar"]
    members = sum(write_tar(path, count // 3, seed) for seed, path in enumerate(tars))
    rows = list(named(count - 2 * (count // 3), seed=2)) + [(f"zeros{n}", bytes(20_000_000)) for n in range(32)]
    pq.write_table(
        pa.table({"image": [data for _, data in rows], "key": [name for name, _ in rows]}), root / "c.parquet"
    )
    (root / "d.parquet").write_bytes((root / "c.parquet").read_bytes()[:-100])
    (root / "e.tar").write_bytes(random.Random(0).randbytes(10_000))
    return [*tars, *(root / name for name in ("c.parquet", "d.parquet", "e.tar"))], members + len(rows)


def processes(pid: int) -> list[int]:
    """A process and its descendants."""
    try:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [pid, *(one for child in children for one in processes(child))]


def memory(pid: int) -> tuple[int, int, int]:
    """Bytes of a process: peak, proportional share of resident memory (half of a page shared by two), and resident."""
    try:
        text = Path(f"/proc/{pid}/status").read_text() + Path(f"/proc/{pid}/smaps_rollup").read_text()
        lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        peak, part, whole = (1024 * int(lines[name].split()[0]) for name in ("VmHWM", "Pss", "Rss"))
        return peak, part, whole
    except (OSError, KeyError, ValueError):
        return 0, 0, 0


def run(sources: list[Path], out: Path, options: list[str]) -> dict[str, Any]:
    """Run `ltmp predict` and monitor its memory."""
    start, largest, together, resident = time.perf_counter(), 0, 0, 0
    command = [sys.executable, "-m", "ltmp.cli", "predict", *map(str, sources), "--out", str(out), *options]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None:
            used = [memory(pid) for pid in processes(process.pid)]
            largest = max([largest, *(peak for peak, _, _ in used)])
            together = max(together, sum(part for _, part, _ in used))
            resident = max(resident, sum(whole for _, _, whole in used))
            time.sleep(0.02)
        output.seek(0)
        text = output.read().decode()
    if process.returncode:
        raise SystemExit(f"ltmp predict ended with {process.returncode}: {text}")
    with (out / "_errors.csv").open(newline="") as file:
        reasons = [row["reason"] for row in csv.DictReader(file)]
    scored = sum(pq.read_metadata(path).num_rows for path in out.glob("*.parquet"))
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "largest process MB": largest // 10**6,
        "all processes MB": together // 10**6,
        "sum of resident MB": resident // 10**6,
        "scored": scored,
        "listed": len(reasons),
        "reasons": len(set(reasons)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--most", type=float, default=1500, help="most megabytes that all processes may use together")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        options = [*tiny_model(root), "--workers", str(args.workers)]
        for what, write in (("files", write_folder), ("members and rows", write_shards)):
            written, images = write(root, args.count)
            sources = [written] if isinstance(written, Path) else written
            results[what] = {"images": images, **run(sources, root / what, options)}
    print(json.dumps(results, indent=2))
    for what, result in results.items():
        if result["scored"] + result["listed"] < result["images"]:
            raise SystemExit(f"{what}: some images were neither scored nor listed")
        if result["all processes MB"] > args.most:
            raise SystemExit(f"{what}: used more memory than {args.most:g} MB")


if __name__ == "__main__":
    main()
