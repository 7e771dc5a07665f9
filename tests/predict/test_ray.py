"""On Ray the same predictor writes the same files, a killed worker notwithstanding."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ltmp.errors import LTMPError
from ltmp.predict import RayOptions, predict
from ltmp.predict.ray import _explain, _import_ray

from .conftest import build_slowly, scoring
from .test_run import break_some, results

ray = pytest.importorskip("ray", reason="needs the extra ray")


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [*children, *(deeper for child in children for deeper in descendants(child))]


def actors() -> list[int]:
    """Processes of this test's own cluster in which a predictor lives."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            if b"MapWorker(MapBatches(Predictor))" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def kill_one_when(out: Path, finished: int, killed: list[int]) -> None:
    """SIGKILL an actor once so many shards are there."""
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.parquet"))) < finished and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in actors()[:1]:
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the actors in /proc")
def test_killed_worker_loses_and_doubles_nothing(tars, tmp_path, monkeypatch):
    root = tars(30, 10)
    break_some(root, 30)
    unbroken = predict([root], tmp_path / "whole", scoring(build=build_slowly))
    # the actors import this module, too
    paths = [Path(__file__).parents[2] / "src", Path(__file__).parents[1], Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out, killed = tmp_path / "out", []
    killer = threading.Thread(target=kill_one_when, args=(out, 4, killed))
    killer.start()
    summary = predict([root], out, scoring(build=build_slowly), ray=RayOptions(actors=2))
    killer.join()
    assert len(killed) == 1
    assert results(out) == results(tmp_path / "whole")
    assert (summary.images, summary.broken) == (unbroken.images, unbroken.broken)
    assert predict([root], out, scoring(build=build_slowly)).continued == 30


def test_what_went_wrong_in_an_actor_is_our_own_sentence():
    text = "ActorDiedError: ...\n  File x, in y\nltmp.errors.LTMPError: cannot write out: disk full\n"
    assert _explain(text) == "cannot write out: disk full"
    text = "ray::Actor\n  File x\nValueError: first\n\nthe above\nRuntimeError: last\n\nTo change retries: see there"
    assert "(RuntimeError: last)" in _explain(text)
    assert "(error: no trace)" in _explain("no trace\nat all")


def test_the_handlers_of_others_keep_their_level():
    logger, handler = logging.getLogger("ray.data"), logging.StreamHandler()
    logger.addHandler(handler)
    try:
        _import_ray()
        assert handler.level == logging.NOTSET
    finally:
        logger.removeHandler(handler)


def test_no_cluster_there_is_said(folder, tmp_path):
    with pytest.raises(LTMPError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        predict([folder], tmp_path / "out", scoring(), ray=RayOptions(address="127.0.0.1:1"))
