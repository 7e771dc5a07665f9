"""Strips, films and figures show every budget and say what it costs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import ltmp
from ltmp.errors import MissingExtraError, UsageError
from ltmp.visualize import ReducedView, figure, frames, panel, save_film, strip
from ltmp.visualize.pictures import choose_blocks


def seen(blocks: int = 6, share: float = 0.6, last_drops: bool = False) -> ReducedView:
    groups = torch.arange(12).view(3, 4).repeat(blocks, 1, 1)
    groups[1:, :, 2:] = 2
    groups[2:, 0, 0] = -3
    if last_drops:
        groups[-1] = -blocks
    return ReducedView(groups, [13 - i for i in range(blocks)], 13, share)


BUDGETS = {"target 0.6": seen(), "target 0.45": seen(share=0.45)}
IMAGE = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """What is written on pictures."""
    texts: list[str] = []
    original = ImageDraw.ImageDraw.text

    def note(self, xy, text, *args, **kwargs):
        texts.append(text)
        box = self.textbbox(xy, text, font=args[1], anchor=kwargs["anchor"])
        assert box[0] >= 0
        assert box[1] >= 0
        assert box[2] <= self.im.size[0] + 1, f"{text!r} is cut off"
        return original(self, xy, text, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", note)
    return texts


@pytest.mark.parametrize("width", [64, 96, 224, 500])
def test_strips_show_each_budget_in_a_row(written, width):
    picture = strip(IMAGE, BUDGETS, [1, 4], width)
    assert picture.width >= 3 * width
    assert picture.height >= 2 * (width * 3 // 4)
    assert {"target 0.6: 0.60 of the FLOPs", "target 0.45: 0.45 of the FLOPs"} <= set(written)
    assert {"13 tokens", "block 2: 12 tokens", "block 5: 9 tokens"} <= set(written)


def test_nothing_of_the_image_is_cut_off():
    white = torch.ones(3, 30, 40)
    red = white * torch.tensor([1.0, 0, 0])[:, None, None]
    pixels = np.asarray(panel(red, seen(), None, 80)).reshape(-1, 3)
    assert (pixels == (255, 0, 0)).all(1).sum() == 80 * 60


def test_films_show_the_image_and_each_block(written):
    film = frames(IMAGE, {"a": seen(last_drops=True)}, width=96)
    assert len(film) == 1 + 5
    assert len({frame.size for frame in film}) == 1
    assert "block 6: 8 tokens" not in written
    assert len(frames(IMAGE, BUDGETS, [0, 5], 96)) == 3


def test_blocks_to_show():
    assert choose_blocks(BUDGETS, None) == [1, 2, 3, 4, 5]
    assert choose_blocks({"deep": seen(12, last_drops=True)}, None) == [2, 4, 6, 8, 10]
    assert choose_blocks({"deep": seen(24)}, None) == [7, 11, 15, 19, 23]
    assert choose_blocks(BUDGETS, [5, 0]) == [5, 0]
    with pytest.raises(UsageError, match="no block 7 to show: the model has blocks 1 to 6"):
        choose_blocks(BUDGETS, [6])
    with pytest.raises(UsageError, match="at least one budget"):
        strip(IMAGE, {})


def test_figures_are_matplotlibs(tmp_path):
    drawn = figure(IMAGE, BUDGETS, [1, 4])
    assert len(drawn.axes) == 6
    assert drawn.axes[0].get_title() == "target 0.6: 0.60 of the FLOPs"
    assert drawn.axes[5].get_title() == "block 5: 9 tokens"
    drawn.savefig(tmp_path / "figure.png")


def test_gifs_keep_flat_colours_and_run_for_ever(tmp_path):
    film = frames(IMAGE, BUDGETS, width=96)
    save_film(film, tmp_path / "film.gif", seconds=0.5)
    saved = Image.open(tmp_path / "film.gif")
    assert (saved.n_frames, saved.size, saved.info["loop"], saved.info["duration"]) == (7, film[0].size, 0, 500)
    assert list(tmp_path.iterdir()) == [tmp_path / "film.gif"]


def test_videos_have_even_sides_and_last(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="MP4 needs the extra video")
    film = [frame.crop((0, 0, 101, 75)) for frame in frames(IMAGE, BUDGETS, width=96)]
    save_film(film, tmp_path / "film.mp4", seconds=0.5)
    about = next(ffmpeg.read_frames(tmp_path / "film.mp4"))
    assert about["size"] == (102, 76)
    assert about["duration"] == pytest.approx(0.5 * (len(film) + 2), abs=0.2)


def test_films_that_cannot_be_written_leave_nothing(tmp_path, monkeypatch):
    film = frames(IMAGE, BUDGETS, [0], 64)
    with pytest.raises(UsageError, match=r"\.gif or \.mp4"):
        save_film(film, tmp_path / "film.avi")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(MissingExtraError, match=r"ltmp\[video\]"):
        save_film(film, tmp_path / "film.mp4")
    with pytest.raises(ltmp.LTMPError):
        save_film(film, "/proc/nowhere/film.gif")
    assert list(tmp_path.iterdir()) == []
