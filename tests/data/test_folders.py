"""One rule says which files are images and which folders classes; what is left out is named."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import colour_image
from ltmp.data import check_classes, open_dataset
from ltmp.data.folders import class_folders, describe_others, list_images, natural_key
from ltmp.errors import LTMPError


def put(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour_image((1, 2, 3)).save(path)
    return root


def classes(root: Path, **how) -> dict[str, list[str]]:
    """The names of the images of each class."""
    data = open_dataset(root, **how)
    found: dict[str, list[str]] = {name: [] for name in data.class_to_index}
    names = list(found)
    for index in range(len(data)):
        found[names[data[index][1]]].append(Path(data.name(index)).name)
    return found


@pytest.fixture
def told(caplog):
    """What the data layer logs, whatever other tests of this process have done to logging."""
    logger = logging.getLogger("ltmp.data.dataset")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_every_ending_counts_and_the_rest_is_named(tmp_path, told):
    endings = ("jpg", "JPEG", "png", "webp", "tif", "TIFF", "bmp", "gif", "ppm", "jfif")
    put(tmp_path, *(f"ant/{number}.{ending}" for number, ending in enumerate(endings)), "bee/0.webp")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    found = classes(tmp_path)
    assert len(found["ant"]) == len(endings)
    assert found["bee"] == ["0.webp"]
    assert "left out 1 file that is no image by name (1 .txt), such as ant/notes.txt" in told.text


def test_hidden_folders_are_no_class(tmp_path, told):
    put(tmp_path, "ant/0.png", "bee/0.png", ".ipynb_checkpoints/0.png", "ant/.ipynb_checkpoints/1.png", "bee/._0.png")
    assert classes(tmp_path) == {"ant": ["0.png"], "bee": ["0.png"]}
    assert told.text == ""


def test_hidden_folders_are_no_split(tmp_path):
    put(tmp_path, "train/ant/0.png", "val/ant/0.png", "val/bee/0.png", ".git/x/0.png")
    assert set(open_dataset(tmp_path, split="validation").class_to_index) == {"ant", "bee"}


def test_images_one_folder_deeper(tmp_path):
    put(tmp_path, "train/n02/images/a.jpg", "train/n02/images/b.jpg", "train/n01/images/c.jpg")
    assert classes(tmp_path, split="train") == {"n01": ["c.jpg"], "n02": ["a.jpg", "b.jpg"]}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["ant/0.jpg", "bee/1.jpg"], ["ant", "bee"]),
        (["pets/cat/0.jpg", "wild/lynx/1.jpg"], ["cat", "lynx"]),
        (["web/cat/0.jpg", "photos/cat/1.jpg", "photos/dog/2.jpg"], ["cat", "cat", "dog"]),
        (["x/images/0.jpg", "y/images/1.jpg"], ["x", "y"]),
        (["data/x/images/0.jpg", "data/y/images/1.jpg"], ["x", "y"]),
        (["data/ant/0.jpg", "data/ant/1.jpg"], ["ant", "ant"]),
        (["0.jpg", "1.jpg"], ["", ""]),
        (["images/0.jpg", "images/1.jpg"], ["images", "images"]),
    ],
)
def test_the_class_is_the_folder_that_tells_images_apart(names, wanted):
    assert class_folders(names) == wanted


def test_a_link_loop_is_entered_once(tmp_path):
    put(tmp_path / "data", "ant/0.png", "bee/1.png")
    (tmp_path / "data" / "ant" / "again").symlink_to(tmp_path / "data", target_is_directory=True)
    (tmp_path / "data" / "aaa").symlink_to(tmp_path / "data" / "bee", target_is_directory=True)
    put(tmp_path / "elsewhere", "2.png")
    (tmp_path / "data" / "cow").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert classes(tmp_path / "data") == {"ant": ["0.png"], "bee": ["1.png"], "cow": ["2.png"]}


def test_classes_that_do_not_fit_name_the_folder(tmp_path):
    put(tmp_path, "ant/0.png", "bee/0.png")
    with pytest.raises(LTMPError, match=rf"^{tmp_path} has 2 classes but the model's head has 3 \(.*'ant', 'bee'\)"):
        check_classes(open_dataset(tmp_path), 3)


def test_folders_that_a_class_map_lacks_are_named(tmp_path, told):
    put(tmp_path, "ant/0.png", "bee/0.png", "cow/0.png")
    data = open_dataset(tmp_path, class_map={"bee": 4})
    assert [data[index][1] for index in range(len(data))] == [4]
    assert "left out the folders 'ant', 'cow', which are not in the class map" in told.text


def test_names_that_are_not_utf8_and_long_ones(tmp_path):
    put(tmp_path, "ant/0.png")
    (tmp_path / "ant" / "0.png").rename(tmp_path / "ant" / "b\udcff.png")
    put(tmp_path, f"bee/{'x' * 240}.png")
    data = open_dataset(tmp_path)
    assert [data[index][1] for index in range(2)] == [0, 1]


def test_others_in_a_few_words():
    assert describe_others(["a.txt"]) == "1 file that is no image by name (1 .txt), such as a.txt"
    said = describe_others(["a.b", "a.c", "a.d", "a.e", "README", "x.b"])
    assert said.startswith("6 files that are no images by name (2 .b, 1 .c, 1 .d, 1 .e, ...), such as a.b")


@given(st.lists(st.text(max_size=8), max_size=8))
def test_natural_order_takes_any_name(names):
    sorted(names, key=natural_key)
    assert sorted(["a10", "a2", "A1"], key=natural_key) == ["A1", "a2", "a10"]


def test_a_folder_that_cannot_be_listed_is_said(tmp_path):
    with pytest.raises(LTMPError, match="cannot list"):
        list_images(tmp_path / "none")
