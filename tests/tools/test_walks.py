"""The walk through transformers says of each class what attaching does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import walk_transformers

    yield walk_transformers
    sys.modules.pop("walk_transformers")


@pytest.mark.parametrize(
    ("name", "status", "host"),
    [
        ("Dinov2Backbone", "matches", "Dinov2Backbone"),
        ("Qwen2_5_VLModel", "matches", "Qwen2_5_VisionTransformerPretrainedModel"),
        ("SamModel", "refused", ""),
        ("SwinModel", "no host", ""),
    ],
)
def test_what_is_found_of_a_class(walks, name: str, status: str, host: str) -> None:
    found = walks.walk(name, walks.classes()[name])
    assert (found.status, found.host) == (status, host), found.reason
    assert bool(found.reason) == (status in ("matches", "refused"))


def test_the_page_has_what_a_walk_writes(walks) -> None:
    found = [walks.Finding("A", "matches", "1e-07", "T"), walks.Finding("B", "refused", "its | windows")]
    text = walks.section(found)
    assert "| refused: its / windows | 1: B |" in text
    assert walks.BLOCK.search(walks.PAGE.read_text())
