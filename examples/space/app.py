"""A Space that shows which patches survive: on the demo's digits, or with your own model if MODEL is set."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import timm

from ltmp.app import Budgets, Explorer, build_page, serving_options
from ltmp.app.default import demo_explorer
from ltmp.data import class_names

MODEL = ""  # for example "deit_small_patch16_224", with its thresholds files in thresholds/
THRESHOLDS = sorted(Path("thresholds").glob("*.safetensors"))


@contextmanager
def say(text: str, total: int | None):
    """Print each long step to the Space's log."""
    print(text, flush=True)
    yield lambda *_: None


def make_explorer() -> Explorer:
    if not MODEL:
        return demo_explorer(Path("ltmp-demo"), say)
    model = timm.create_model(MODEL, pretrained=True).eval()
    return Explorer(model, Budgets.from_files(model, THRESHOLDS), classes=class_names(model))


if __name__ == "__main__":
    build_page(make_explorer()).launch(**serving_options())
