"""Learning and evaluation on several ranks against one process: differences of thresholds and results, and time.

    python benchmarks/distributed.py --ranks 2 --batch-size 16 -- --data images/ --val val/ \
        --model deit_small_patch16_224 --pretrained --views 640 --calibration 128

Options after `--` are those of `ltmp learn`. The batch size of the single process is that of all ranks together.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from ltmp.checkpoint import read
from ltmp.evaluate import tables


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="of each rank")
    parser.add_argument("learn", nargs="*", metavar="OPTION", help="options of `ltmp learn`")
    return parser.parse_args()


def learn(ranks: int, batch: int, options: list[str], out: Path) -> dict[str, Any]:
    """Run `ltmp learn` on some ranks; returns its JSON results, its thresholds and the seconds it took."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "ltmp", "learn", *options, "--batch-size", str(batch)]
    start = perf_counter()
    subprocess.run([*command, "--out", str(out), "--json", str(out / "learn.json")], check=True)
    file = read(out / "thresholds.safetensors")
    return {
        **json.loads((out / "learn.json").read_text()),
        "merge": file.merge,
        "prune": file.prune,
        "seconds": perf_counter() - start,
    }


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        one = learn(1, args.batch_size * args.ranks, args.learn, Path(folder) / "one")
        many = learn(args.ranks, args.batch_size, args.learn, Path(folder) / "many")
    rows = [
        {
            "ranks": ranks,
            "share": result["share"],
            **{name: result.get(name) for name in ("top1_dense", "top1")},
            "loss of the last step": result["history"][-1]["loss"],
            "seconds": result["seconds"],
        }
        for ranks, result in ((1, one), (args.ranks, many))
    ]
    tables.show(rows, "1 process and several ranks")
    for name in ("merge", "prune"):
        print(f"largest difference of a {name} threshold: {(one[name] - many[name]).abs().max().item():.1e}")
    steps = list(zip(one["history"], many["history"], strict=True))
    for name in ("loss", "share"):
        print(f"largest difference of a step's {name}: {max(abs(a[name] - b[name]) for a, b in steps):.1e}")


if __name__ == "__main__":
    main()
