"""What nobody means well: every image is scored or listed, nothing else is touched, and no run waits for ever."""

from __future__ import annotations

import csv
import os
import shutil
import tarfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ltmp.data import workers
from ltmp.errors import LTMPError, UsageError
from ltmp.predict import find_shards, predict, reading, shards

from .conftest import encoded, scoring, write_tar
from .test_sources import parquet_file


def errors(out):
    with open(out / "_errors.csv", newline="") as file:
        return {row["key"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("count", [0, 1])
def test_pipes_devices_and_sparse_files_are_listed(tmp_path, count):
    root = tmp_path / "images"
    root.mkdir()
    os.mkfifo(root / "pipe.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to("/nowhere/at/all.png")
    with open(root / "sparse.png", "wb") as file:
        file.truncate(200 * 10**9)
    (root / "good.png").write_bytes(encoded(1))
    parquet_file(tmp_path / "paths.parquet", path=[f"images/{name}.png" for name in ("good", "pipe", "zero", "sparse")])
    for source, broken in ((root, 4), (tmp_path / "paths.parquet", 3)):
        out = tmp_path / f"out{broken}"
        summary = predict([source], out, scoring(workers=count))
        assert (summary.images, summary.broken) == (1, broken)
        assert "over the limit" in str(errors(out))
        assert "not a regular file" in str(errors(out))


def test_pipes_that_are_called_as_shards_are_refused(tmp_path):
    for name in ("a.tar", "a.parquet"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(UsageError, match="is a pipe, a device or a folder"):
            find_shards([tmp_path / name])


def test_a_tar_of_absolute_names_duplicates_and_damage(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [("/etc/0.png", encoded(1)), ("../0.png", encoded(2)), ("../0.png", encoded(3)), ("x\r\n.png", b"broken")],
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.LNKTYPE, "/etc/0.png"
        archive.addfile(link)
    summary = predict([path], tmp_path / "out", scoring())
    assert (summary.images, summary.broken, summary.duplicates) == (4, 1, 1)
    assert set(errors(tmp_path / "out")) == {"x  .png"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "out"]


def test_empty_parquet_is_said(tmp_path):
    path = parquet_file(tmp_path / "a.parquet", image=pa.array([], pa.binary()))
    with pytest.raises(LTMPError, match=r"there are no images to score in a.parquet"):
        predict([path], tmp_path / "out", scoring())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([1, 2], "int64"),
        ([True, False], "bool"),
        ([1.5, 2.5], "double"),
        ([[b"a", b"b"], [b"c"]], "list<element: binary>|list<item: binary>"),
        ([[{"bytes": b"a", "path": "a"}], []], "list<"),
        ([{"x": 1}, {"x": 2}], "struct<x: int64>"),
        ([{"bytes": {"bytes": b"a"}}], "struct<bytes: struct<"),
    ],
)
def test_a_column_that_holds_no_image_a_row_is_refused(tmp_path, values, kind):
    path = parquet_file(tmp_path / "a.parquet", image=values)
    with pytest.raises(UsageError, match=f"column 'image' holds ({kind})"):
        find_shards([path], column="image")
    with pytest.raises(UsageError, match="no column that looks like images"):
        find_shards([path])


@pytest.mark.parametrize("name", ["image", "key"])
def test_columns_of_one_name_are_told_apart_before_the_work(tmp_path, name):
    columns = {"image": pa.array([encoded(1)]), "key": pa.array(["a"])}
    table = pa.Table.from_arrays([*columns.values(), columns[name]], ["image", "key", name])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"more than one column '{name}'"):
        find_shards([tmp_path / "a.parquet"], key_column="key")
    if name == "key":
        assert predict([tmp_path / "a.parquet"], tmp_path / "out", scoring()).images == 1


def test_keys_that_python_has_no_value_for_cost_no_image(tmp_path):
    path = parquet_file(tmp_path / "a.parquet", image=[encoded(1)] * 2, key=pa.array([10**15, 1], pa.timestamp("s")))
    assert [item.key for item in find_shards([path])[0].items()] == ["row 0", "1970-01-01 00:00:01"]


def test_links_in_a_circle_are_listed(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    for number in range(60):
        (root / f"{number:02d}.png").symlink_to(f"{number + 1:02d}.png")
    (root / "60.png").write_bytes(encoded(1))
    (root / "round.png").symlink_to("round.png")
    summary = predict([root], tmp_path / "out", scoring())
    assert summary.images + summary.broken == 62
    assert errors(tmp_path / "out")["round.png"] == "Too many levels of symbolic links"


def test_any_kind_of_bytes_or_text_is_taken(tmp_path):
    one = encoded(1)
    kinds = [pa.large_binary(), pa.binary_view(), pa.binary(len(one)), pa.dictionary(pa.int32(), pa.binary())]
    for kind in kinds:
        (shard,) = find_shards([parquet_file(tmp_path / "a.parquet", image=pa.array([one]).cast(kind))])
        assert [item.content for item in shard.items()] == [one]


def test_keys_of_any_length_and_kind_are_listed(tmp_path):
    keys = ["k" * 200_000, "a\rb", "=HYPERLINK(1)", "\x1b[31mred", "o[/red]", "{1}"]
    path = parquet_file(tmp_path / "a.parquet", image=[b"broken"] * len(keys) + [encoded(1)], key=[*keys, "good"])
    summary = predict([path], tmp_path / "out", scoring())
    assert (summary.images, summary.broken) == (1, len(keys))
    listed = list(errors(tmp_path / "out"))
    assert listed[1:] == ["a b", "'=HYPERLINK(1)", "\\x1b[31mred", "o[/red]", "{1}"]
    assert len(listed[0]) == 1000


def test_names_of_300_letters_and_not_of_utf8(tmp_path):
    for name in ("x" * 251, "y\udcff" * 100):
        path = tmp_path / f"{name[:251]}.tar" if name[0] == "x" else tmp_path / f"{name}.parquet"
        if path.suffix == ".tar":
            write_tar(path, [("n" * 300 + ".png", encoded(1))])
        else:
            parquet_file(tmp_path / "plain.parquet", image=[encoded(1)])
            (tmp_path / "plain.parquet").rename(path)
        assert predict([path], tmp_path / f"out{path.suffix}", scoring()).images == 1


def test_batches_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "AHEAD", 2500)
    path = parquet_file(tmp_path / "a.parquet", image=[bytes(1000)] * 10)
    plan = reading.ShardBatches(find_shards([path]), 64)
    assert [len(batch) for batch in plan] == [3, 3, 3, 1, 1]


def test_rows_are_read_one_at_a_time(tmp_path):
    path = parquet_file(tmp_path / "a.parquet", image=[bytes(2_000_000)] * 64)
    (shard,) = find_shards([path])
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in shard.items()]
    assert max(held) < 12_000_000


@pytest.mark.parametrize("kind", ["binary", "dictionary", "struct"])
def test_rows_that_are_too_large_are_not_copied(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "LARGE_BYTES", 10_000)
    values = pa.array([bytes(20_000), encoded(1)])
    if kind == "dictionary":
        values = values.dictionary_encode()
    if kind == "struct":
        values = pa.StructArray.from_arrays([values, pa.array(["a", "b"])], ["bytes", "path"])
    (shard,) = find_shards([parquet_file(tmp_path / "a.parquet", image=values)])
    large, good = shard.items()
    assert "0 MB are over the limit of 0 MB for one row" in large.content.reason
    assert good.content == encoded(1)


def test_what_unpacks_to_far_more_than_images_do_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_DECODED", 1_000_000)
    table = pa.table({"image": [bytes(50_000)] * 30 + [encoded(1)] * 10, "key": [str(row) for row in range(40)]})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, row_group_size=30)
    (shard,) = find_shards([tmp_path / "a.parquet"])
    refused, *good = shard.items()
    assert "unpack to 0.0 GB, which no images do" in refused.content.reason
    assert "rows 0 to 29 cannot be read" in refused.content.reason
    assert [item.key for item in good] == [str(row) for row in range(30, 40)]


def test_small_shared_memory_is_no_reason_to_stop(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "free_shared_memory", lambda: 0)
    predict([folder], tmp_path / "pipe", scoring(workers=2), shard_size=4)
    predict([folder], tmp_path / "here", scoring(), shard_size=4)
    for path in (tmp_path / "here").glob("*.parquet"):
        assert path.read_bytes() == (tmp_path / "pipe" / path.name).read_bytes()


def test_an_out_that_goes_away_is_no_success(folder, tmp_path):
    out, calls = tmp_path / "out", []

    def report(*_):
        calls.append(1)
        if len(calls) == 4:
            shutil.rmtree(out)

    with pytest.raises(LTMPError, match=r"files are gone from .*out again, such as 00000.parquet"):
        predict([folder], out, scoring(), shard_size=4, report=report)


def test_overwrite_removes_nothing_of_others(folder, tmp_path):
    out = tmp_path / "out"
    predict([folder], out, scoring(), shard_size=4)
    ours = sorted(path.name for path in out.glob("*.parquet"))
    for name in ("mine.parquet", ".mine.parquet.tmp", "_errors/mine.csv"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("precious")
    predict([folder], out, scoring(), shard_size=100, overwrite=True)
    assert {(out / name).read_text() for name in ("mine.parquet", ".mine.parquet.tmp", "_errors/mine.csv")} == {
        "precious"
    }
    assert sorted(path.name for path in out.glob("0*.parquet")) == ours[:1]


def test_a_manifest_reaches_no_other_folder(folder, tmp_path):
    out = tmp_path / "out"
    predict([folder], out, scoring())
    (tmp_path / "mine.parquet").write_text("precious")
    text = (out / "_run.json").read_text()
    (out / "_run.json").write_text(text.replace('"00000"', '"../mine"'))
    predict([folder], out, scoring(), overwrite=True)
    assert (tmp_path / "mine.parquet").read_text() == "precious"


def test_a_lock_that_is_a_link_empties_nothing(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("precious")
    (out / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(LTMPError, match="cannot lock"):
        predict([folder], out, scoring())
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("name", ["_run.json", "_errors.csv", "00000.parquet", "_errors/00000.csv", "_errors"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_is_written_through_links_or_waited_for(folder, tmp_path, name, kind, overwrite):
    out, mine = tmp_path / "out", tmp_path / "mine"
    predict([folder], out, scoring())
    mine.mkdir()
    (mine / "00000.csv").write_text("precious")
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).unlink(missing_ok=True)
    if kind == "link":
        (out / name).symlink_to(mine if name == "_errors" else mine / "00000.csv")
    else:
        os.mkfifo(out / name)
    with pytest.raises(UsageError, match=rf"out/{name} is not a regular (file|folder), .*: remove it, or choose"):
        predict([folder], out, scoring(), overwrite=overwrite)
    assert (mine / "00000.csv").read_text() == "precious"


def test_a_probe_of_others_is_left_alone(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "mine").write_text("precious")
    (out / ".probe").symlink_to(tmp_path / "mine")
    predict([folder], out, scoring())
    assert (out / ".probe").is_symlink()
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_nested_too_deep_is_no_end(folder, tmp_path, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / "_run.json").write_text("[" * 100_000)
    if overwrite:
        assert predict([folder], out, scoring(), overwrite=True).images == 10
    else:
        with pytest.raises(LTMPError, match=r"_run\.json cannot be read .*nested too deep.*--overwrite"):
            predict([folder], out, scoring())


def test_a_jpeg_of_endless_scans_is_listed_at_once(tmp_path):
    root = tmp_path / "images"
    root.mkdir()
    whole = encoded(1, 1000, "JPEG")
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00\x00"
    (root / "bomb.jpg").write_bytes(whole[:-2] + scan * 20_000 + b"\xff\xd9")
    (root / "good.png").write_bytes(encoded(1))
    start = time.perf_counter()
    summary = predict([root], tmp_path / "out", scoring())
    assert time.perf_counter() - start < 4
    assert (summary.images, summary.broken) == (1, 1)
