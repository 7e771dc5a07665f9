"""What the app shows where nobody names a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from huggingface_hub import constants

from ltmp.app.default import SHOWN, shows_photographs
from ltmp.cli import main
from ltmp.demo import TRAINED
from ltmp.files.tensors import write_tensors

# without extra app there are none, and the digits are shown
pytest.importorskip("skimage", reason="the photographs are scikit-image's")


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Weights of `SHOWN` as the hub's client leaves them in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "cache" / "models--timm--deit_small_patch16_224.fb_in1k"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    weights = place / "snapshots" / ("0" * 40) / "model.safetensors"
    weights.parent.mkdir(parents=True)
    write_tensors(timm.create_model(SHOWN).state_dict(), weights, {})
    return weights


@pytest.mark.parametrize("options", [[], ["--device", "cpu"]], ids=["bare", "device"])
def test_photographs_where_weights_are_here(fetched, options, monkeypatch, capsys):
    opened = []

    def build_page(explorer):
        opened.append(explorer)
        raise KeyboardInterrupt

    monkeypatch.setattr("ltmp.app.build_page", build_page)
    main(["app", *options])
    (explorer,) = opened
    assert explorer.timed
    assert explorer.deployment.name(281).startswith("tabby")
    comparison = explorer.compare(explorer.open(explorer.samples[1]), explorer.budgets.start)
    assert comparison.reduction.share < 1
    assert comparison.reduced.seconds > 0


def test_else_the_digits(fetched, tmp_path):
    assert shows_photographs(tmp_path)
    (tmp_path / TRAINED).touch()
    assert not shows_photographs(tmp_path)
    (tmp_path / TRAINED).unlink()
    fetched.unlink()
    assert not shows_photographs(tmp_path)
