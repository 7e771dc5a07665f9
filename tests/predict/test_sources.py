"""What the user names becomes the same shards each time, or one sentence that says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltmp.errors import LTMPError, UsageError
from ltmp.predict import find_shards, sources

from .conftest import encoded, write_tar


def keys(shards):
    return [[item.key for item in shard.items()] for shard in shards]


def test_folder_is_read_to_the_bottom_in_order_and_split(folder):
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes(encoded(0))
    deep = folder / "1" / "deep"
    deep.mkdir()
    (deep / "UPPER.JPG").write_bytes(encoded(1, kind="JPEG"))
    shards = find_shards([folder], shard_size=4)
    assert keys(shards) == [
        ["0/00.png", "0/02.png", "0/04.png", "0/06.png"],
        ["0/08.png", "1/01.png", "1/03.png", "1/05.png"],
        ["1/07.png", "1/09.png", "1/deep/UPPER.JPG"],
    ]
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    assert [shard.images for shard in shards] == [4, 4, 3]
    assert find_shards([f"file://{folder}"], shard_size=4) == find_shards([folder], shard_size=4) == shards


@given(count=st.integers(1, 50), size=st.integers(1, 20))
def test_splitting_loses_and_doubles_nothing(count, size):
    images = [(f"{k:03d}.jpg", k) for k in range(count)]
    parts = sources._folder_shards(Path("x"), images, size)
    assert [image for part in parts for image in part.files] == images
    assert all(len(part.files) == size for part in parts[:-1])
    assert len({part.name for part in parts}) == len({part.fingerprint for part in parts}) == len(parts)


def test_folder_that_links_to_itself_ends(folder):
    (folder / "1" / "again").symlink_to(folder, target_is_directory=True)
    (folder / "linked.png").symlink_to(folder / "0" / "00.png")
    assert [name for names in keys(find_shards([folder])) for name in names][-1] == "linked.png"
    assert sum(shard.images for shard in find_shards([folder])) == 11


def test_fingerprint_follows_names_and_sizes(folder):
    before = find_shards([folder], shard_size=5)
    (folder / "1" / "09.png").write_bytes(encoded(9) + b"x")
    after = find_shards([folder], shard_size=5)
    assert before[0].fingerprint == after[0].fingerprint
    assert before[1].fingerprint != after[1].fingerprint


@pytest.mark.parametrize(
    "pattern", ["train-00{0..2}.tar", "train-{000..002}.tar", "train-*.tar", "train-{000,001,002}.tar", "", "**/*.tar"]
)
def test_tars_by_folder_and_pattern(tars, pattern):
    root = tars(3, 2)
    shards = find_shards([f"{root}/{pattern}"])
    assert [shard.name for shard in shards] == ["00000-train-000", "00001-train-001", "00002-train-002"]
    assert keys(shards) == [["0000.png", "0001.png"], ["0002.png", "0003.png"], ["0004.png", "0005.png"]]


@given(st.integers(0, 120), st.integers(0, 30), st.integers(1, 4))
def test_braces_count_with_leading_zeros(first, more, width):
    found = list(sources._expand_braces(f"a{{{first:0{width}d}..{first + more}}}-{{x,y}}"))
    assert found == [f"a{k:0{width}d}-{end}" for k in range(first, first + more + 1) for end in "xy"]


def parquet_file(path: Path, /, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("columns", "image", "key"),
    [
        ({"id": [1, 2], "image": [b"a", b"b"]}, "image", "id"),
        ({"label": [1, 2], "weird": [b"a", b"b"]}, "weird", None),
        ({"url": ["a.png", "b.png"], "n": [1, 2]}, "url", None),
        ({"image": [{"bytes": b"a", "path": "a.png"}] * 2}, "image", None),
        ({"jpg": [b"a", b"b"], "__key__": ["a", "b"], "path": ["p", "q"]}, "jpg", "__key__"),
    ],
)
def test_parquet_columns_are_found(tmp_path, columns, image, key):
    (shard,) = find_shards([parquet_file(tmp_path / "a.parquet", **columns)])
    assert (shard.column, shard.key_column, shard.images) == (image, key, 2)


def test_parquet_columns_can_be_named(tmp_path):
    path = parquet_file(tmp_path / "a.pq", one=[b"a"], two=[b"b"], name=["x"])
    (shard,) = find_shards([path], column="two", key_column="name")
    assert [(item.key, item.content) for item in shard.items()] == [("x", b"b")]
    with pytest.raises(UsageError, match="name it with --column"):
        find_shards([path])
    with pytest.raises(UsageError, match="no column 'three': it has one, two, name"):
        find_shards([path], column="three")


def bad_sources(root: Path):
    (root / "empty").mkdir()
    (root / "a.zip").write_bytes(b"x")
    (root / "a.tar.gz").write_bytes(b"x")
    write_tar(root / "a.tar", [])
    mixed = root / "mixed"
    mixed.mkdir()
    (mixed / "a.png").write_bytes(b"x")
    write_tar(mixed / "b.tar", [])
    both = root / "both"
    both.mkdir()
    write_tar(both / "b.tar", [])
    parquet_file(both / "c.parquet", image=[b"x"])
    parquet_file(root / "web.parquet", url=["https://example.org/a.jpg"])
    return {
        "none": "none does not exist: give a folder",
        "x{0..3}.tar": r"x0.tar \(part of .*\) does not exist",
        "empty": "holds no images: expected image files, or shards",
        "a.zip": "neither a folder nor a .tar nor a .parquet",
        "a.tar.gz": "is compressed",
        "mixed": "holds image files and also b.tar",
        "both": "holds .tar and .parquet files",
        "web.parquet": "https://example.org/a.jpg is not on this machine, and nothing is downloaded",
    }


def test_bad_sources_are_refused_in_a_sentence(tmp_path):
    for name, message in bad_sources(tmp_path).items():
        with pytest.raises(LTMPError, match=message):
            find_shards([tmp_path / name])
    with pytest.raises(LTMPError, match="nothing is downloaded"):
        find_shards(["https://example.org/a.tar"])
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="other is a folder of images, and not the only source"):
        find_shards([tmp_path / "both" / "b.tar", tmp_path / "other"])
    with pytest.raises(UsageError, match="one is a folder of images, and not the only source"):
        find_shards([tmp_path / "one", tmp_path / "other"])
    with pytest.raises(UsageError, match="given twice"):
        find_shards([tmp_path / "a.tar", tmp_path / "*.tar"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path, folder):
    tar = write_tar(tmp_path / "a.tar", [])
    tar.chmod(0)
    with pytest.raises(LTMPError, match="permission denied"):
        find_shards([tar])
    (folder / "1").chmod(0)
    with pytest.raises(LTMPError, match="cannot list"):
        find_shards([folder])
    (folder / "1").chmod(0o700)


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..9}" * 9 + ".tar"])
def test_braces_that_never_end_are_refused(pattern):
    with pytest.raises(UsageError, match="stands for more than 1,000,000 files"):
        sources.find_shards([pattern])
