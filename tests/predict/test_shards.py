"""Shards give every image that is there, in order, and say at their end what could not be reached."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltmp.data import Broken
from ltmp.errors import LTMPError
from ltmp.predict import find_shards
from ltmp.predict.shards import local_path

from .conftest import encoded, write_tar


def read(item):
    """The bytes of an item, or None where it is broken."""
    if isinstance(item.content, Broken):
        return None
    if isinstance(item.content, bytes):
        return item.content
    if isinstance(item.content, str):
        with open(item.content, "rb") as file:
            return file.read()
    with open(item.content.path, "rb") as file:
        file.seek(item.content.offset)
        return file.read(item.content.size)


def test_tar_passes_over_what_is_no_image(tmp_path):
    members = [
        ("a.png", b"A"),
        ("a.json", b"{}"),
        ("sub/b.JPEG", b"BB"),
        ("._c.png", b"resource fork"),
        ("d.webp", b"D"),
    ]
    (shard,) = find_shards([write_tar(tmp_path / "a.tar", members)])
    items = list(shard.items())
    assert [(item.row, item.key, read(item)) for item in items] == [
        (0, "a.png", b"A"),
        (1, "sub/b.JPEG", b"BB"),
        (2, "d.webp", b"D"),
    ]
    assert 0 < items[0].position < items[1].position < items[2].position <= 1


@settings(max_examples=40)
@given(share=st.floats(0, 1))
def test_truncated_tar_gives_what_is_whole_and_says_so(tmp_path_factory, share):
    root = tmp_path_factory.mktemp("cut")
    sizes = [10, 700, 512, 1, 2000]
    path = write_tar(root / "a.tar", [(f"{k}.png", bytes([65 + k]) * size) for k, size in enumerate(sizes)])
    whole = path.read_bytes()
    ends, offset = [], 0
    for size in sizes:
        ends.append(offset + 512 + size)
        offset += 512 + -(-size // 512) * 512
    cut = round(share * len(whole))
    path.write_bytes(whole[:cut])
    (shard,) = find_shards([path])
    items = list(shard.items())
    complete = [item for item in items if read(item) is not None and len(read(item)) == sizes[item.row]]
    assert [item.row for item in complete] == [k for k, end in enumerate(ends) if end <= cut]
    told = [item for item in items if isinstance(item.content, Broken)]
    if cut >= offset + 512:
        assert told == []
    else:
        assert len(told) == 1
        assert told[0] is items[-1]
        assert told[0].key == "a.tar"


def test_damaged_header_costs_its_own_member(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"A"), ("b.png", b"B"), ("c.png", b"C")])
    data = bytearray(path.read_bytes())
    data[1024:1536] = b"x" * 512
    path.write_bytes(data)
    items = list(find_shards([path])[0].items())
    assert [(item.row, item.key, read(item)) for item in items] == [
        (0, "a.png", b"A"),
        (1, "a.tar", None),
        (2, "c.png", b"C"),
    ]
    assert "damaged at byte 1024" in items[1].content.reason


def test_what_is_no_tar_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"garbage" * 1000)
    (item,) = find_shards([tmp_path / "a.tar"])[0].items()
    assert "not an uncompressed .tar" in item.content.reason


def test_parquet_of_bytes_structs_and_paths(tmp_path, folder):
    one, two = encoded(1), encoded(2)
    structs = pa.array([{"bytes": one, "path": "one.png"}, {"bytes": None, "path": "images/0/00.png"}, None])
    plain = {"image": structs, "url": ["images/0/02.png", (folder / "1" / "01.png").as_uri(), "s3://bucket/a.png"]}
    pq.write_table(pa.table(plain), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [two, None], "key": ["x", None]}), tmp_path / "b.parquet")

    (shard,) = find_shards([tmp_path / "a.parquet"])
    items = list(shard.items())
    assert [item.key for item in items] == ["one.png", "images/0/00.png", "row 2"]
    assert [read(item) for item in items] == [one, (folder / "0" / "00.png").read_bytes(), None]

    (shard,) = find_shards([tmp_path / "a.parquet"], column="url")
    items = list(shard.items())
    assert [read(item) for item in items] == [
        (folder / "0" / "02.png").read_bytes(),
        (folder / "1" / "01.png").read_bytes(),
        None,
    ]
    assert "nothing is downloaded" in items[2].content.reason

    items = list(find_shards([tmp_path / "b.parquet"])[0].items())
    assert [(item.key, read(item)) for item in items] == [("x", two), ("row 1", None)]


def test_damaged_parquet_gives_what_is_whole(tmp_path):
    path = tmp_path / "a.parquet"
    images = [bytes([k]) * 3000 for k in range(200)]
    pq.write_table(pa.table({"image": images}), path, row_group_size=50, use_dictionary=False, compression="snappy")
    data = bytearray(path.read_bytes())
    middle = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    data[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(data)
    items = list(find_shards([path])[0].items())
    assert [item.content for item in items if item.row != 100] == images[:100] + images[150:]
    assert items[100].content.reason.startswith("rows 100 to 149 cannot be read: ")

    path.write_bytes(data[: len(data) // 2])
    (item,) = find_shards([path])[0].items()
    assert "not a complete Parquet file" in item.content.reason


def test_local_paths():
    assert local_path("a b.png") == "a b.png"
    assert local_path("file:///data/a%20b.png") == "/data/a b.png"
    for name in ("http://x/a.png", "s3://x/a.png", "file://other/a.png"):
        with pytest.raises(LTMPError, match="nothing is downloaded"):
            local_path(name)
