"""Bulk scoring: its throughput against a plain timm loop, and whether killed runs give the results of undisturbed ones.

    python benchmarks/predict.py speed --images 2000 --threads 2
    python benchmarks/predict.py kills --images 20000 --kills 5
    python benchmarks/predict.py kills --images 20000 --kills 1 --runner ray

Images are generated in a temporary folder. `kills` runs `ltmp predict`, kills it with SIGKILL at random moments (on
Ray: one of its actors), resumes it, and compares the outputs row by row with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import uuid
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_dataset, create_loader, resolve_model_data_config
from torch import nn

import ltmp
from ltmp.data import eval_transform
from ltmp.learning import calibrate
from ltmp.predict import Scoring, predict

TINY = {"img_size": 64, "num_classes": 10, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}


def jpeg(number: int, size: int) -> bytes:
    """A photograph-like image, different for each number: coarse blobs under fine noise."""
    noise = np.random.default_rng(number)
    coarse = Image.fromarray(noise.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((size, size), 3)
    fine = noise.integers(-20, 21, (size, size, 3))
    pixels = (np.asarray(coarse, np.int16) + fine).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tars(root: Path, images: int, shard_size: int) -> None:
    """WebDataset shards of 64-pixel images; one image in a thousand is damaged."""
    for shard, start in enumerate(range(0, images, shard_size)):
        with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
            for number in range(start, min(start + shard_size, images)):
                data = jpeg(number, 64)[: 300 if number % 1000 == 500 else None]
                info = tarfile.TarInfo(f"{number:07d}.jpg")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def tiny_model(root: Path) -> list[str]:
    """Write the files of a tiny reduced model; returns them as options of `ltmp predict`."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.15)
    save_file(model.state_dict(), root / "model.safetensors")
    transform = eval_transform(model)
    samples = torch.stack([transform(Image.open(io.BytesIO(jpeg(number, 64)))) for number in range(64)])
    calibrate(ltmp.attach(model), samples, 0.6)
    ltmp.save(model, root / "thresholds.safetensors", architecture="vit_tiny_patch16_224")
    sizes = " ".join(f"{name}={value}" for name, value in TINY.items())
    files = ["--weights", str(root / "model.safetensors"), "--thresholds", str(root / "thresholds.safetensors")]
    return [*files, "--model-kwargs", sizes, "--device", "cpu"]


class Run:
    """`ltmp predict` in a separate process."""

    def __init__(self, source: Path, out: Path, options: list[str]) -> None:
        self.out = out
        self.mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "ltmp.cli", "predict", str(source), "--out", str(out), *options]
        self.process = subprocess.Popen(
            command,
            env={**os.environ, "LTMP_BENCHMARK": self.mark},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finished(self) -> int:
        """Number of output shards."""
        return len(list(self.out.glob("*.parquet")))

    def wait_for(self, shards: int) -> bool:
        """Wait until `shards` shards are finished; False if the run ends first."""
        while self.process.poll() is None:
            if self.finished() >= shards:
                return True
            time.sleep(0.01)
        return False

    def actors(self) -> list[int]:
        """Process ids of this run's Ray actors that hold a predictor."""
        pids = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = self.mark.encode() in (folder / "environ").read_bytes()
                if ours and b"MapBatches(Predictor)" in (folder / "cmdline").read_bytes():
                    pids.append(int(folder.name))
            except OSError:
                continue
        return pids

    def end(self) -> None:
        """Wait for the process; raises SystemExit with its output if it failed."""
        _, output = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(f"ltmp predict failed: {output}")


def kill_and_continue(source: Path, out: Path, options: list[str], shards: int, kills: int, seed: int) -> None:
    """Kill the command at random moments, and resume it each time."""
    chance = random.Random(seed)
    for target in sorted(chance.uniform(0, 0.9) * shards for _ in range(kills)):
        run = Run(source, out, options)
        if not run.wait_for(int(target)):
            raise SystemExit(f"the run was over before it could be killed: {run.process.communicate()[1]}")
        time.sleep(chance.uniform(0, 1))
        run.process.send_signal(signal.SIGKILL)
        run.process.communicate()
        print(f"  killed (exit {run.process.returncode}) with {run.finished()} of {shards} shards", flush=True)
    Run(source, out, options).end()


def kill_actors(source: Path, out: Path, options: list[str], shards: int, kills: int, seed: int) -> None:
    """Kill actors of a run on Ray at random moments, while the run itself continues."""
    chance = random.Random(seed)
    run = Run(source, out, options)
    for target in sorted(chance.uniform(0.05, 0.9) * shards for _ in range(kills)):
        if not run.wait_for(int(target)):
            raise SystemExit(f"the run was over before an actor could be killed: {run.process.communicate()[1]}")
        time.sleep(chance.uniform(0, 1))
        victim = chance.choice(run.actors())
        os.kill(victim, signal.SIGKILL)
        print(f"  killed actor {victim} with {run.finished()} of {shards} shards", flush=True)
    run.end()


def compare(whole: Path, broken: Path) -> dict[str, Any]:
    """Compare two runs row by row; raises SystemExit on the first difference."""
    names = sorted(path.name for path in whole.glob("*.parquet"))
    if names != sorted(path.name for path in broken.glob("*.parquet")):
        raise SystemExit("the runs have different files")
    rows = 0
    for name in names:
        one, other = pq.read_table(whole / name), pq.read_table(broken / name)
        if not one.equals(other):
            raise SystemExit(f"{name} differs")
        rows += len(one)
    if (whole / "_errors.csv").read_bytes() != (broken / "_errors.csv").read_bytes():
        raise SystemExit("the lists of damaged images differ")
    keys = pq.read_table(broken, columns=["key"])["key"].to_pylist()
    damaged = len((broken / "_errors.csv").read_text().splitlines()) - 1
    return {"rows": rows, "keys": len(set(keys)), "damaged": damaged, "files": len(names), "equal": True}


def kills(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Compare an undisturbed run with one that is killed and resumed."""
    source, whole, broken = root / "images", root / "whole", root / "broken"
    source.mkdir()
    write_tars(source, options.images, options.shard_size)
    shards = -(-options.images // options.shard_size)
    arguments = tiny_model(root)
    start = time.perf_counter()
    Run(source, whole, arguments).end()
    print(f"  undisturbed run: {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    if options.runner == "ray":
        arguments += ["--runner", "ray", "--actors", str(options.actors)]
        kill_actors(source, broken, arguments, shards, options.kills, options.seed)
    else:
        kill_and_continue(source, broken, arguments, shards, options.kills, options.seed)
    print(f"  with {options.kills} kills: {time.perf_counter() - start:.0f} s", flush=True)
    result = compare(whole, broken)
    if result["rows"] + result["damaged"] != options.images or result["keys"] != result["rows"]:
        raise SystemExit(f"images were lost or duplicated: {result}")
    return {**result, "images": options.images, "kills": options.kills, "runner": options.runner}


def timm_loop(model: nn.Module, folder: Path, batch_size: int, workers: int) -> float:
    """Images per second of the usual loop with timm: its dataset, loader and transform."""
    config = resolve_model_data_config(model)
    start, images = time.perf_counter(), 0
    loader = create_loader(
        create_dataset("", root=str(folder)),
        batch_size=batch_size,
        use_prefetcher=False,
        num_workers=workers,
        device=torch.device("cpu"),
        **{name: config[name] for name in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    with torch.inference_mode():
        for batch, _ in loader:
            model(batch).softmax(-1).topk(5)
            images += len(batch)
    return images / (time.perf_counter() - start)


def predict_loop(scoring: Scoring, folder: Path, out: Path) -> float:
    """Images per second of `ltmp.predict`."""
    summary = predict([folder], out, scoring, overwrite=True)
    return summary.images_per_second or 0.0


def identity(model: nn.Module) -> nn.Module:
    return model


def speed(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Median throughput of the timm loop and of `ltmp.predict`, dense and reduced."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain = timm.create_model(options.model).eval()
    reduced = ltmp.attach(timm.create_model(options.model).eval())
    reduced.load_state_dict(plain.state_dict(), strict=False)
    folder = root / "images" / "all"
    folder.mkdir(parents=True)
    with ProcessPoolExecutor(options.threads) as pool:
        for number, data in enumerate(pool.map(partial(jpeg, size=options.size), range(options.images), chunksize=32)):
            (folder / f"{number:06d}.jpg").write_bytes(data)
    transform = eval_transform(plain)
    samples = [transform(Image.open(path)) for path in sorted(folder.iterdir())[:64]]
    calibrate(reduced, torch.stack(samples), options.target)
    scoring = Scoring(partial(identity, plain), batch_size=options.batch_size, workers=options.workers)
    ways = {
        "timm loop": lambda: timm_loop(plain, folder.parent, options.batch_size, options.workers),
        "predict, dense": lambda: predict_loop(scoring, folder.parent, root / "dense"),
        "predict, reduced": lambda: predict_loop(
            replace(scoring, build=partial(identity, reduced)), folder.parent, root / "out"
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            times[name].append(way())
            print(f"  {name} {times[name][-1]:.1f} images/s", flush=True)
    share = predict([folder.parent], root / "out", replace(scoring, build=partial(identity, reduced))).share
    speeds = {name: median(rounds) for name, rounds in times.items()}
    ratios = {f"{name}, ratio": speeds[name] / speeds["timm loop"] for name in list(speeds)[1:]}
    return {"model": options.model, "threads": options.threads, "share": share, **speeds, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "kills"])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--shard-size", type=int, default=250, help="images per tar (kills)")
    parser.add_argument("--runner", choices=["local", "ray"], default="local")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments to kill at")
    parser.add_argument("--model", default="deit_small_patch16_224", help="timm model (speed)")
    parser.add_argument("--target", type=float, default=0.56, help="share of the dense FLOPs (speed)")
    parser.add_argument("--size", type=int, default=256, help="pixels per side (speed)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = (speed if options.what == "speed" else kills)(options, Path(folder))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
