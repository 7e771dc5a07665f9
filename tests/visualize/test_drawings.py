"""Drawings show what they claim."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image
from torch import Tensor

from ltmp.errors import MissingExtraError
from ltmp.visualize import paint_groups, plot_tradeoff


def four_patches() -> Tensor:
    """[3, 32, 32]: black, white above mid grey, black."""
    image = torch.zeros(3, 32, 32)
    image[:, :16, 16:] = 1.0
    image[:, 16:, :16] = 0.5
    return image


def test_patches_are_painted_by_their_fate():
    image = four_patches()
    # 0 alone, 1 and 3 merged, 2 pruned in block 4
    painted = paint_groups(image, torch.tensor([[7, 1], [-5, 1]]))
    assert torch.equal(painted[:, :16, :16], image[:, :16, :16])
    inside = painted[:, 4:28, 20:28]
    assert torch.allclose(inside, torch.tensor(0.5))
    pruned = painted[:, 16:, :16]
    assert torch.equal(pruned[0], pruned[1])
    assert 0.06 < pruned.min() < pruned.max() < 0.5
    assert len(pruned.unique()) == 2


def test_borders_are_thin_whatever_the_size():
    groups = torch.tensor([[0, 1], [2, 1]])
    for side in (32, 64, 128, 512):
        painted = paint_groups(four_patches(), groups, (side, side))
        border = (painted[0, side // 4 : -side // 4, side // 2 :] - 0.5).abs() > 0.1
        assert border[0, : side // 4].sum() == max(1, round(side / 250))
        # an edge of the image is none, and neither is one inside the group
        assert not border[:, side // 4 :].any()


def test_singles_have_no_border():
    image = torch.rand(3, 6, 4)
    assert torch.equal(paint_groups(image, torch.arange(6).view(3, 2)), image)


@pytest.mark.parametrize("grid", [(1, 1), (3, 7), (14, 2), (16, 16)])
def test_any_grid_on_any_image(grid):
    image = torch.rand(3, 37, 61)
    groups = torch.randint(-3, 6, grid, dtype=torch.int32)
    painted = paint_groups(image, groups, (90, 70))
    assert painted.shape == (3, 90, 70)
    assert ((painted >= 0) & (painted <= 1)).all()
    # more patches than pixels are still no error
    assert paint_groups(image, groups, (5, 5)).shape == (3, 5, 5)


def test_mean_colours_are_those_of_the_group():
    image = torch.rand(3, 40, 60)
    groups = torch.tensor([[0, 0, 1], [0, 2, 1]])
    painted = paint_groups(image, groups)
    members = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool().repeat_interleave(20, 0).repeat_interleave(20, 1)
    assert torch.allclose(painted[:, 10, 10], image[:, members].mean(1), atol=1e-6)


def test_plot_is_a_picture(tmp_path):
    plot_tradeoff([1.0, 0.5], [97.0, 96.5], tmp_path / "plot.png", title="digits")
    assert Image.open(tmp_path / "plot.png").size == (750, 525)


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib.*ltmp\[plot\]"):
        plot_tradeoff([1.0], [97.0], tmp_path / "plot.png")
