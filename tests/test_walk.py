"""The walk through the code in docs/contributing.md lists the files that a call enters, in order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import timm
import torch

import ltmp

PAGE = (Path(__file__).parents[1] / "docs" / "contributing.md").read_text()
PACKAGE = Path(ltmp.__file__).parent


def entered(call: Any) -> list[str]:
    """Return the files of ltmp in which `call` runs a function, in the order in which it first enters them."""
    files: dict[str, None] = {}

    def record(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and PACKAGE in path.parents:
            files.setdefault(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(files)


def test_a_call_takes_the_walk_of_the_docs() -> None:
    pytest.importorskip("numba", reason="compiled decisions need the extra cpu")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=2).eval()
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    model.ltmp.set(torch.tensor([0.5, 0.6, 0.7]), torch.tensor([0.001, 0.01, 0.01]))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(images)
        files = entered(lambda: model(images))
    section = PAGE[PAGE.index("## A walk") : PAGE.index("## Style")]
    walk = re.findall(r"^\| \d+ \| `([\w/]+\.py)`", section, re.MULTILINE)
    assert len(walk) == 10
    assert [file for file in files if file in walk] == walk
    mentioned = set(re.findall(r"`([\w/]+\.py)`", section)) - set(walk)
    assert set(files) - set(walk) <= mentioned
