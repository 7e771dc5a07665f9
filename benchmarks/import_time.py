"""Seconds that imports and quick commands take, each in its own process, interleaved.

    python benchmarks/import_time.py

Prints the minimum and the median of each, and what `import ltmp` adds to importing timm and looking up a model name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

TIMM = "import timm; timm.list_models(); timm.is_model('deit_small_patch16_224')"
WAYS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import ltmp": ["-c", "import ltmp"],
    "import timm": ["-c", TIMM],
    "import ltmp, timm": ["-c", f"import ltmp; {TIMM}"],
    "import timm, ltmp": ["-c", f"{TIMM}; import ltmp"],
    "ltmp --version": ["-m", "ltmp", "--version"],
    "ltmp --help": ["-m", "ltmp", "--help"],
    "ltmp lern": ["-m", "ltmp", "lern"],
    "ltmp learn --dta x": ["-m", "ltmp", "learn", "--dta", "x"],
    "ltmp learn --help": ["-m", "ltmp", "learn", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Wall time of one Python process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measured = [{way: seconds(arguments) for way, arguments in WAYS.items()} for _ in range(rounds)]
    for way in WAYS:
        times = [one[way] for one in measured]
        print(f"{way:20} {min(times):6.2f} {median(times):6.2f}")
    for way in ("import ltmp, timm", "import timm, ltmp"):
        print(f"{way}: {median(one[way] - one['import timm'] for one in measured):+.2f} s on top of import timm")


if __name__ == "__main__":
    main()
