"""A Space that shows which patches survive: the demo's digits, until MODEL is set to a model of your own."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import timm

from ltmp.app import Budgets, Explorer, build_page, serving_options
from ltmp.app.default import demo_explorer
from ltmp.data import class_names

MODEL = ""  # for example "deit_small_patch16_224", with its files in thresholds/
THRESHOLDS = sorted(Path("thresholds").glob("*.safetensors"))


@contextmanager
def say(text: str, total: int | None):
    """A line in the Space's log for each long step."""
    print(text, flush=True)
    yield lambda *_: None


def make_explorer() -> Explorer:
    if not MODEL:
        return demo_explorer(Path("ltmp-demo"), say)
    model = timm.create_model(MODEL, pretrained=True).eval()
    return Explorer(model, Budgets.from_files(model, THRESHOLDS), classes=class_names(model))


if __name__ == "__main__":
    build_page(make_explorer()).launch(**serving_options())
