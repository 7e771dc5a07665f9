"""A run that was stopped, by whatever means, goes on and ends as an unbroken one; nothing else is mixed in."""

from __future__ import annotations

import csv
import multiprocessing
import os
import random
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch

from helpers import tiny_vit
from ltmp.errors import LTMPError, UsageError
from ltmp.files import locked
from ltmp.predict import predict

from .conftest import build_slowly, encoded, scoring, write_tar


def results(out):
    """Every result file's content by name."""
    paths = [*out.glob("*.parquet"), *out.glob("_errors/*"), *out.glob("_errors.csv")]
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


class StoppedError(Exception):
    pass


def stop_after(batches):
    """A report that ends the run as Ctrl-C would, at a batch of our choice."""
    left = iter(range(batches))

    def report(*_):
        if next(left, None) is None:
            raise StoppedError

    return report


def break_some(root, count):
    """Broken images in several shards."""
    for shard in range(0, count, 2):
        path = root / f"train-{shard:03d}.tar"
        write_tar(path, [("x.png", b""), *((f"{shard}-{k}.png", encoded(k)) for k in range(3)), ("y.png", b"?")])


@pytest.mark.parametrize("batches", [0, 1, 3, 7])
def test_stopped_anywhere_it_goes_on(tars, tmp_path, batches):
    root = tars(4, 5)
    break_some(root, 4)
    unbroken = predict([root], tmp_path / "whole", scoring())
    with pytest.raises(StoppedError):
        predict([root], tmp_path / "out", scoring(), report=stop_after(batches))
    there = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(there) < 4
    summary = predict([root], tmp_path / "out", scoring())
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == then for name, then in there.items())
    assert (summary.continued, unbroken.continued) == (len(there), 0)
    for name in ("images", "broken", "duplicates", "shards", "share"):
        assert getattr(summary, name) == pytest.approx(getattr(unbroken, name))
    assert (summary.images, summary.broken) == (16, 4)
    with open(summary.errors, newline="") as file:
        listed = [(line["shard"], line["row"], line["key"]) for line in csv.DictReader(file)]
    names = ["00000-train-000", "00002-train-002"]
    assert listed == [(name, row, key) for name in names for row, key in (("0", "x.png"), ("4", "y.png"))]
    again = predict([root], tmp_path / "out", scoring())
    assert (again.continued, again.images_per_second, again.images) == (4, None, 16)


def score_in_a_process(root, out):
    torch.set_num_threads(1)  # a forked process must not wait for the threads it left behind
    predict([root], out, scoring(build=build_slowly, workers=1))


def test_killed_twice_at_random_moments(tars, tmp_path):
    root = tars(30, 10)
    break_some(root, 30)
    predict([root], tmp_path / "whole", scoring(build=build_slowly))
    out = tmp_path / "out"
    fork = multiprocessing.get_context("fork")
    moments = random.Random(0)
    for kill in range(2):
        process = fork.Process(target=score_in_a_process, args=(root, out))
        process.start()
        while len(list(out.glob("*.parquet"))) < 5 + 10 * kill:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(list(out.glob("*.parquet"))) < 30
    summary = predict([root], out, scoring(build=build_slowly))
    assert summary.continued >= 15
    assert results(out) == results(tmp_path / "whole")
    assert sorted(path.name for path in out.glob(".*")) == [".lock"]


def test_leftovers_of_a_kill_are_swept_and_files_are_taken_whole_or_not(folder, tmp_path):
    out = tmp_path / "out"
    predict([folder], out, scoring(), shard_size=4)
    whole = results(out)
    left = [out / ".00001.parquet.0123abcd.ltmp-tmp", out / "_errors" / ".00001.csv.0123abcd.ltmp-tmp"]
    mine = [out / ".probe", out / ".probe-notes.txt", out / ".00001.parquet.old"]
    (out / "_errors").mkdir(exist_ok=True)
    for path in (*left, *mine):
        path.write_text("half")
    (out / "_errors" / "00001.csv").write_text("row,key,reason\n0,x,stale\n")
    (out / "00001.parquet").write_bytes((out / "00001.parquet").read_bytes()[:-20])
    assert predict([folder], out, scoring(), shard_size=4).continued == 2
    assert results(out) == whole
    assert [path.exists() for path in left] == [False, False]
    assert [path.read_text() for path in mine] == ["half"] * 3


def other_model():
    return tiny_vit(seed=1)


def test_another_run_is_refused_by_what_differs(folder, tmp_path):
    out = tmp_path / "out"
    predict([folder], out, scoring(), shard_size=4)
    for changes, what in [
        ({"top": 3}, "--top: 2 then, 3 now"),
        ({"batch_size": 5}, "batch size: 4 then, 5 now"),
        ({"embeddings": True}, "embeddings: False then, True now"),
        ({"build": other_model}, "weights"),
        ({"build": tiny_vit}, "thresholds: .* then, none now"),
        ({"transform": {"crop_pct": 0.5}}, "transform"),
        ({"amp": True}, "--amp"),
        ({"class_names": tuple("abcde")}, "class names"),
        ({"about": {"name": "x"}}, "name: none then, x now"),
    ]:
        with pytest.raises(UsageError, match=f"another {what}"):
            predict([folder], out, scoring(**changes), shard_size=4)
    with pytest.raises(UsageError, match="other images: 3 shards then, 5 now"):
        predict([folder], out, scoring(), shard_size=2)
    (folder / "0" / "00.png").write_bytes(encoded(0) + b"more")
    with pytest.raises(UsageError, match=r"other images: .* from 0/00.png has changed"):
        predict([folder], out, scoring(), shard_size=4)
    assert predict([folder], out, scoring(workers=1), shard_size=2, overwrite=True).continued == 0
    assert sorted(results(out)) == [f"{k:05d}.parquet" for k in range(5)]
    assert len(pq.read_table(out)) == 10


def test_moved_source_is_the_same(folder, tmp_path):
    predict([folder], tmp_path / "out", scoring())
    folder.rename(tmp_path / "moved")
    assert predict([tmp_path / "moved"], tmp_path / "out", scoring()).continued == 1


def test_bad_output_folders(folder, tmp_path):
    with pytest.raises(UsageError, match="lies inside the source"):
        predict([folder], folder / "out", scoring())
    with pytest.raises(UsageError, match="lies inside the source"):
        predict([folder], folder, scoring())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        predict([folder], tmp_path / "file", scoring())
    with pytest.raises(UsageError, match="holds other files, but no run"):
        predict([folder], tmp_path, scoring())
    with pytest.raises(LTMPError, match="cannot write"):
        predict([folder], "/proc/nowhere", scoring())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "_run.json").write_text("{")
    with pytest.raises(LTMPError, match=r"_run.json cannot be read"):
        predict([folder], tmp_path / "out", scoring())


def test_wrong_call_removes_nothing(folder, tmp_path):
    predict([folder], tmp_path / "out", scoring())
    with pytest.raises(UsageError, match="top is 9"):
        predict([folder], tmp_path / "out", scoring(top=9), overwrite=True)
    assert len(pq.read_table(tmp_path / "out")) == 10


def hold(out, held, done):

    with locked(out):
        held.set()
        done.wait(20)


def test_one_run_at_a_time(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()
    process = fork.Process(target=hold, args=(out, held, done))
    process.start()
    assert held.wait(20)
    with pytest.raises(LTMPError, match="another run is writing"):
        predict([folder], out, scoring())
    done.set()
    process.join()
    assert predict([folder], out, scoring()).images == 10


def test_nothing_readable_is_a_failure(tmp_path):
    path = write_tar(tmp_path / "a.tar", [("a.png", b"?"), ("b.png", b"")])
    with pytest.raises(LTMPError, match=r"none of the images could be read; .*_errors.csv lists the reasons"):
        predict([path], tmp_path / "out", scoring())


def test_full_disk_leaves_what_is_finished(folder, tmp_path, monkeypatch):
    from ltmp.predict import writer

    write = writer.parquet().write_table
    calls = iter(range(9))

    def full(*arguments):
        if next(calls) == 1:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(writer.parquet(), "write_table", full)
    with pytest.raises(LTMPError, match="the disk is full"):
        predict([folder], tmp_path / "out", scoring(), shard_size=4)
    assert predict([folder], tmp_path / "out", scoring(), shard_size=4).continued == 1
    assert len(pq.read_table(tmp_path / "out")) == 10


def test_progress_ends_at_the_number_of_images(folder, tars, tmp_path):
    for source, total in ((folder, 10), (tars(3, 5), 15)):
        told = []
        predict([source], tmp_path / f"out{total}", scoring(), report=lambda *values, told=told: told.append(values))
        assert told[-1][:2] == (total, total)
        assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
        assert all(done <= of for done, of, _ in told)
        assert "images/s, share 0." in told[-1][2]
