"""Seconds that imports and the command line's quick answers take, each in a process of its own, in turns.

    python benchmarks/import_time.py

Prints the least and the median of each, and what `import ltmp` adds to timm's import and to its first look at a name.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from statistics import median

LOOK = "import timm; timm.list_models(); timm.is_model('deit_small_patch16_224')"
WAYS = {
    "python": ["-c", "pass"],
    "import torch": ["-c", "import torch"],
    "import ltmp": ["-c", "import ltmp"],
    "import timm": ["-c", LOOK],
    "import ltmp, timm": ["-c", f"import ltmp; {LOOK}"],
    "import timm, ltmp": ["-c", f"{LOOK}; import ltmp"],
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
    found = [{way: seconds(arguments) for way, arguments in WAYS.items()} for _ in range(rounds)]
    for way in WAYS:
        times = [one[way] for one in found]
        print(f"{way:20} {min(times):6.2f} {median(times):6.2f}")
    for way in ("import ltmp, timm", "import timm, ltmp"):
        print(f"{way}: {median(one[way] - one['import timm'] for one in found):+.2f} s beside import timm")


if __name__ == "__main__":
    main()
