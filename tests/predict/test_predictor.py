"""The predictor's numbers are the model's own, whatever the batches; what cannot be read is told and left out."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import zlib
from functools import partial
from itertools import count

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

import ltmp
from helpers import tiny_vit
from ltmp.data import eval_transform
from ltmp.data.workers import detect_lost_workers
from ltmp.errors import LTMPError, UsageError
from ltmp.predict import Predictor, find_shards, predictor
from ltmp.predict.reading import read_batches

from .conftest import build, encoded, scoring, write_tar


def run(source, out, **changes):
    shards = find_shards([source], shard_size=changes.pop("shard_size", 1024))
    return list(Predictor(scoring(**changes), out).score(shards))


def rows(out):
    return pq.read_table(out).to_pylist()


def inputs(folder, model):
    transform = eval_transform(model)
    return torch.stack([transform(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


@torch.inference_mode()
def test_classes_are_the_models_own(folder, tmp_path):
    (written,) = run(folder, tmp_path / "out", batch_size=10, top=3)
    model = build()
    images = inputs(folder, model)
    with ltmp.record() as calls:
        probabilities, classes = model(images).softmax(-1).topk(3)
    found = rows(tmp_path / "out")
    assert [row["key"] for row in found] == [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.png"))]
    assert [row["row"] for row in found] == list(range(10))
    assert [row["classes"] for row in found] == classes.tolist()
    assert [row["probabilities"] for row in found] == probabilities.tolist()
    assert [row["share"] for row in found] == calls.share().tolist()
    assert [row["tokens"] for row in found] == calls.kept[0][:, -1].tolist()
    assert len({row["tokens"] for row in found}) > 1
    assert written.share == pytest.approx(calls.share().mean().item())


@torch.inference_mode()
def test_embeddings_are_what_enters_the_classifier(folder, tmp_path):
    run(folder, tmp_path / "out", batch_size=10, embeddings=True)
    model = build()
    wanted = model.forward_head(model.forward_features(inputs(folder, model)), pre_logits=True)
    table = pq.read_table(tmp_path / "out")
    assert table.column_names == ["key", "row", "embedding", "tokens", "share"]
    assert str(table.schema.field("embedding").type) == "list<element: float>"
    assert table["embedding"].to_pylist() == wanted.tolist()


def test_without_thresholds_it_runs_dense(folder, tmp_path):
    run(folder, tmp_path / "out", build=tiny_vit)
    assert {(row["share"], row["tokens"]) for row in rows(tmp_path / "out")} == {(1.0, None)}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, tmp_path, workers):
    run(folder, tmp_path / "here", shard_size=3)
    run(folder, tmp_path / "there", shard_size=3, workers=workers)
    for path in sorted((tmp_path / "here").glob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes()


def test_batches_do_not_cross_shards(folder):
    shards = find_shards([folder], shard_size=4)
    entries = read_batches(shards, eval_transform(tiny_vit()), mode="RGB", batch_size=3, workers=0)
    sizes = [len(entry.rows) if hasattr(entry, "rows") else entry.shard.name for entry in entries]
    assert sizes == [3, 1, "00000", 3, 1, "00001", 2, "00002"]


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (20_000).to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_listed_and_the_rest_scored(tmp_path, workers):
    members = [
        ("good.png", encoded(1)),
        ("zero.png", b""),
        ("half.jpg", encoded(2, 200, "JPEG")[:-900]),
        ("text.png", b"no image"),
        ("bomb.png", bomb()),
        ("good.png", encoded(3)),
        ("last.png", encoded(4)),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes().rstrip(b"\0")[:-5])  # without the end of last.png
    (written,) = run(path, tmp_path / "out", workers=workers)
    assert (written.images, written.broken, written.duplicates) == (2, 6, 1)
    assert [(row["key"], row["row"]) for row in rows(tmp_path / "out")] == [("good.png", 0), ("good.png", 5)]
    lines = (tmp_path / "out" / "_errors" / "00000-a.csv").read_text().splitlines()
    assert lines[0] == "row,key,reason"
    told = [
        "1,zero.png,the file is empty",
        "2,half.jpg,image file is truncated",
        '3,text.png,"not an image',
        "4,bomb.png,over",
        "6,last.png,the .tar ends inside",
        "7,a.tar,the .tar is truncated",
    ]
    assert [line[: len(start)] for line, start in zip(lines[1:], told, strict=True)] == told


def test_files_that_went_away_or_are_locked_are_listed(folder, tmp_path):
    shards = find_shards([folder])
    (folder / "0" / "00.png").unlink()
    (folder / "0" / "02.png").chmod(0)
    (written,) = Predictor(scoring(), tmp_path / "out").score(shards)
    text = (tmp_path / "out" / "_errors" / "00000.csv").read_text()
    assert "0,0/00.png,No such file or directory" in text
    if os.geteuid():
        assert "1,0/02.png,Permission denied" in text
    assert written.images + written.broken == 10


def test_shard_without_a_readable_image_has_the_same_columns(tmp_path):
    root = tmp_path / "tars"
    root.mkdir()
    write_tar(root / "0.tar", [("a.png", b"broken")])
    write_tar(root / "1.tar", [("a.png", encoded(1))])
    for embeddings in (False, True):
        out = tmp_path / f"out{embeddings}"
        names = ("a", "b", "c", "d", "e")
        assert [w.images for w in run(root, out, embeddings=embeddings, class_names=names)] == [0, 1]
        first, second = (pq.read_schema(path) for path in sorted(out.glob("*.parquet")))
        assert first == second
    (row,) = rows(tmp_path / "outFalse")
    assert row["names"] == [names[index] for index in row["classes"]]


def test_grey_model_gets_grey_images(tmp_path, folder):
    (written,) = run(folder, tmp_path / "out", build=grey, transform={"mean": [0.5], "std": [0.5]})
    assert written.images == 10


def grey():
    return tiny_vit(in_chans=1)


def test_call_of_ray_data_scores_what_is_missing(folder, tmp_path):
    shards = find_shards([folder], shard_size=4)
    predictor = Predictor(pickle.loads(pickle.dumps(scoring())), tmp_path / "out")
    batch = {"shard": np.array([pickle.dumps(shard) for shard in shards[:2]])}
    assert list(predictor(batch)["images"]) == [4, 4]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    batch = {"shard": np.array([pickle.dumps(shard) for shard in shards])}
    assert predictor(batch)["name"].tolist() == ["00000", "00001", "00002"]
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    assert len(rows(tmp_path / "out")) == 10


def lose_a_worker(calls, *arguments, **how):
    """`read_batches` whose first decoding process is killed on its way."""
    batches = iter(read_batches(*arguments, **how))
    if next(calls) == 0:
        yield next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    yield from batches


def test_killed_decoding_process_is_said_and_an_actor_tries_again(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(predictor, "read_batches", partial(lose_a_worker, count()))
    shards = find_shards([folder], shard_size=2)
    predict = Predictor(scoring(workers=1, batch_size=1), tmp_path / "out")
    with pytest.raises(LTMPError, match="a process that decodes images was killed"):
        list(predict.score(shards))
    monkeypatch.setattr(predictor, "read_batches", partial(lose_a_worker, count()))
    predict({"shard": np.array([pickle.dumps(shard) for shard in shards])})
    assert [row["key"] for row in rows(tmp_path / "out")] == [item.key for shard in shards for item in shard.items()]


def test_signal_of_a_killed_process_that_comes_late_is_the_same_loss():
    def late(*_):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(LTMPError, match="a process that decodes images was killed"), detect_lost_workers():
            raise EOFError
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), "the signal is still to come"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def headless():
    return tiny_vit(num_classes=0)


def diverged():
    model = tiny_vit()
    torch.nn.init.constant_(model.head.bias, float("nan"))
    return model


def other():
    return torch.nn.Linear(1, 1)


def test_what_the_model_cannot_give_is_said(folder, tmp_path):
    for changes, message in [
        ({"top": 6}, "top is 6: expected 1 to 5"),
        ({"build": headless}, "has no classifier"),
        ({"class_names": ("a", "b")}, "2 class names for a model with 5 classes"),
        ({"build": other, "embeddings": True}, "no forward_head"),
    ]:
        with pytest.raises((UsageError, LTMPError), match=message):
            Predictor(scoring(**changes), tmp_path / "out")
    with pytest.raises(LTMPError, match=r"NaN or infinite in .*images"):
        run(folder, tmp_path / "out", build=diverged)
    assert not list((tmp_path / "out").glob("*.parquet"))


def imagenet():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)


def test_names_come_with_pretrained_weights_only(tmp_path):
    assert not Predictor(scoring(build=imagenet), tmp_path).deployment.names
    names = Predictor(scoring(build=imagenet, pretrained=True), tmp_path).deployment.names
    assert len(names) == 1000
    assert names[0].startswith("tench")
    assert not Predictor(scoring(pretrained=True), tmp_path).deployment.names
