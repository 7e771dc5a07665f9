"""`ltmp show` draws photographs, and says in one sentence why it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ltmp as package
from ltmp.cli.verbs.show import parse_blocks
from ltmp.errors import UsageError

from .conftest import NAME, SHAPE


@pytest.fixture(scope="session")
def budgets(tmp_path_factory):
    """Two thresholds files that reduce anything."""
    folder, files = tmp_path_factory.mktemp("budgets"), []
    model = package.attach(timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE))
    for target, merge in ((0.8, 0.9), (0.5, 0.2)):
        model.ltmp.set([merge] * 3, [0.0, 0.02, 0.0])
        files.append(folder / f"budget-{target}.safetensors")
        package.save(model, files[-1], target=target, model_name=NAME)
    return files


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def options(budgets):
    return [word for file in budgets for word in ("--thresholds", file)]


def test_default_names_and_what_is_said(ltmp, budgets, photo, tmp_path, capsys):
    before = photo.read_bytes()
    assert ltmp("show", photo, *options(budgets)) == 0
    picture = Image.open(tmp_path / "ltmp-show" / "photo-patches.png")
    assert picture.width > 4 * 224
    said = capsys.readouterr().out
    assert all(word in said for word in ("photo.png", "target 0.8", "target 0.5", "photo-patches.png"))
    assert photo.read_bytes() == before


def test_every_format_and_json(ltmp, budgets, photo, tmp_path, capsys):
    pytest.importorskip("imageio_ffmpeg", reason="MP4 needs the extra video")
    formats = [word for kind in ("png", "gif", "mp4", "blocks") for word in ("--format", kind)]
    out = tmp_path / "out"
    assert ltmp("show", photo, *options(budgets), *formats, "--out", out, "--width", 64, "--json", "-") == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert sorted(one["files"]) == sorted(str(file) for file in out.iterdir())
    names = {file.name for file in out.iterdir()}
    assert {"photo-patches.png", "photo-patches.gif", "photo-patches.mp4", "photo-patches-00.png"} <= names
    assert len(one["budgets"]["target 0.5"]["kept"]) == 3
    assert re.fullmatch(r"dense class \d \d+% -> reduced class \d \d+%", one["budgets"]["target 0.5"]["answers"])
    assert one["budgets"]["target 0.5"]["share"] < one["budgets"]["target 0.8"]["share"] <= 1
    assert Image.open(out / "photo-patches.gif").n_frames == len([name for name in names if name.endswith(".png")]) - 1


def test_one_file_of_any_kind(ltmp, budgets, photo, tmp_path):
    for name in ("strip.png", "film.gif"):
        assert ltmp("show", photo, *options(budgets[:1]), "--out", tmp_path / name, "--blocks", "1-2") == 0
    assert Image.open(tmp_path / "film.gif").n_frames == 3


def test_a_squashed_photograph_keeps_its_shape(ltmp, budgets, photo, tmp_path):
    shapes = []
    for mode in ("squash", "center"):
        out = tmp_path / f"{mode}.png"
        assert ltmp("show", photo, *options(budgets[:1]), "--crop-pct", 1, "--crop-mode", mode, "--out", out) == 0
        shapes.append(Image.open(out).height)
    # two lines of text, three parts to two against a square
    assert shapes[1] - shapes[0] == 224 - round(224 * 30 / 45)


def test_same_names_do_not_collide(ltmp, budgets, photo, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "photo.jpg").write_bytes(photo.read_bytes())
    assert ltmp("show", photo, other / "photo.jpg", *options(budgets[:1]), "--width", 64) == 0
    assert {file.name for file in (tmp_path / "ltmp-show").iterdir()} == {
        "photo-patches.png", "photo-2-patches.png",
    }  # fmt: skip


def test_folders_are_their_images(ltmp, budgets, photo, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("b.png", "a.png"):
        (folder / name).write_bytes(photo.read_bytes())
    (folder / "notes.txt").write_text("no image")
    assert ltmp("show", folder, *options(budgets[:1]), "--width", 64) == 0
    assert {file.name for file in (tmp_path / "ltmp-show").iterdir()} == {"a-patches.png", "b-patches.png"}


def test_what_cannot_be_shown_is_said(ltmp, budgets, photo, tmp_path, capsys):
    text = tmp_path / "text.png"
    text.write_text("not an image")
    file = options(budgets[:1])
    for code, words, arguments in (
        (2, "no image nowhere.png", ["nowhere.png", *file]),
        (1, "cannot read", [text, *file]),
        (2, "no thresholds file", [photo, "--thresholds", "none.safetensors"]),
        (2, "was given twice", [photo, *file, *file]),
        (2, "expected numbers from 1 to 3", [photo, *file, "--blocks", "9"]),
        (2, "expected numbers from 1 to 3", [photo, *file, "--blocks", "x"]),
        (2, "unknown format 'svg'", [photo, *file, "--format", "svg"]),
        (2, "is one file, but there are 2 images", [photo, photo, *file, "--out", "one.png"]),
        (2, "holds no images", [budgets[0].parent, *file]),
        (2, "is itself to be shown", [photo, *file, "--out", photo]),
    ):
        assert ltmp("show", *arguments) == code
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        assert words in lines[0]
    assert not (tmp_path / "ltmp-show").exists()


def test_blocks_are_counted_from_one():
    assert parse_blocks("2,4-6", 12) == [1, 3, 4, 5]
    assert parse_blocks("all", 3) == [0, 1, 2]
    for text in ("", "a", "1-", "-2", "1;2"):
        with pytest.raises(UsageError, match="--blocks"):
            parse_blocks(text, 12)


def test_models_are_left_as_they_were(budgets, photo, tmp_path):
    from ltmp.visualize.showing import show_images

    model = timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        show_images(model, [photo], budgets, tmp_path / "out", width=64)
        assert torch.equal(model(images), expected)
    assert not hasattr(model, "ltmp")


def test_braces_and_markup_in_names_are_letters(ltmp, images, budgets, tmp_path, capsys):
    photo = tmp_path / "a{1}[red]\x1b.png"
    photo.write_bytes(next(images.rglob("*.png")).read_bytes())
    assert ltmp("show", photo, *options(budgets[:1]), "--out", tmp_path / "out", "--format", "blocks") == 0
    assert (tmp_path / "out" / "a{1}[red]\x1b-patches-01.png").exists()
    assert "\x1b" not in capsys.readouterr().out


def test_the_longest_of_names_is_cut(ltmp, budgets, photo, tmp_path):
    photograph = photo.rename(photo.with_name(f"{'n' * 251}.png"))
    assert ltmp("show", photograph, *options(budgets[:1]), "--out", "drawn") == 0
    assert [file.name for file in Path("drawn").iterdir()] == [f"{'n' * 200}-patches.png"]
