"""Drawings show what they claim."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from ltmp.errors import MissingExtraError
from ltmp.visualize import paint_groups, plot_tradeoff
from ltmp.visualize.overlay import PRUNED


def test_patches_are_painted_by_their_fate():
    image = torch.zeros(3, 4, 4)
    image[:, :2, 2:] = 1.0
    image[:, 2:, 2:] = 0.5
    # patches: 0 alone, 1 and 3 merged, 2 pruned
    painted = paint_groups(image, torch.tensor([1, 4, -1, 4]), (2, 2), tint=0.0)
    assert torch.equal(painted[:, :2, :2], image[:, :2, :2])
    assert torch.allclose(painted[:, :, 2:], torch.tensor(0.75))
    assert torch.allclose(painted[:, 2:, :2], torch.tensor(PRUNED)[:, None, None].expand(3, 2, 2))


def test_nothing_reduced_leaves_the_image():
    image = torch.rand(3, 6, 4)
    assert torch.equal(paint_groups(image, torch.arange(6), (3, 2)), image)


def test_plot_is_a_picture(tmp_path):
    plot_tradeoff([1.0, 0.5], [97.0, 96.5], tmp_path / "plot.png", title="digits")
    assert Image.open(tmp_path / "plot.png").size == (750, 525)


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*ltmp\[plot\]"):
        plot_tradeoff([1.0], [97.0], tmp_path / "plot.png")
