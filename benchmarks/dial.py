"""How long `set_budget` takes, over a thousand budgets, for models of several depths.

python benchmarks/dial.py
python benchmarks/dial.py --device cuda     # while the device is busy: set_budget must not wait for it
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import torch

import ltmp
from ltmp.evaluate import tables
from ltmp.method.dial import Dial
from ltmp.method.thresholds import Thresholds

KNOTS = 16


def turns(depth: int, device: str) -> list[float]:
    """Microseconds of each call, sorted; on a GPU with work queued first, so that synchronising would show."""
    own = Thresholds(depth, ltmp.LTMPConfig()).to(device)
    share = torch.linspace(0.3, 0.95, KNOTS)
    tables = (torch.rand(KNOTS, depth) * 0.9, torch.rand(KNOTS, depth) * 0.01 + 1e-6, torch.rand(KNOTS, depth) + 1)
    own.set_dial(Dial(share, *tables))
    busy = torch.rand(4096, 4096, device=device) if device != "cpu" else None
    took = []
    for budget in torch.rand(1000).mul(0.6).add(0.32).tolist():
        if busy is not None:
            busy = busy @ busy
        begin = perf_counter()
        own.set_budget(budget)
        took.append(1e6 * (perf_counter() - begin))
    return sorted(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    rows: list[tables.Row] = []
    for depth in (12, 24, 40):
        took = turns(depth, args.device)
        rows.append({"blocks": depth, "median us": median(took), "99 of 100 us": took[990], "longest us": took[-1]})
    tables.show(rows, f"set_budget on {args.device}")


if __name__ == "__main__":
    main()
