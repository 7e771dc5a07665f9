"""Every item is answered once, by its own result, in batches of the size and time that were asked for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import CancelledError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ltmp.serve.batching import Batcher


class Doubling:
    """Doubles numbers, remembers its batches, and waits for `go` where told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.go.set()
        self.began = threading.Event()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.threads.add(threading.get_ident())
        self.began.set()
        assert self.go.wait(10)
        if -1 in items:
            raise ValueError("minus one")
        return [2 * item for item in items]


@pytest.fixture
def run() -> Doubling:
    return Doubling()


@pytest.fixture
def batcher(run):
    batcher = Batcher(run, max_batch=4, max_wait=0.05)
    batcher.start()
    yield batcher
    run.go.set()
    batcher.stop()


def test_a_full_batch_does_not_wait(run):
    batcher = Batcher(run, max_batch=4, max_wait=30)
    batcher.start()
    assert [f.result(5) for f in [batcher.submit(i) for i in range(4)]] == [0, 2, 4, 6]
    assert run.batches == [[0, 1, 2, 3]]
    batcher.stop()


def test_a_lonely_item_waits_for_the_window_only(batcher, run):
    start = time.perf_counter()
    assert batcher.submit(3).result(5) == 6
    assert 0.04 < time.perf_counter() - start < 2
    assert run.batches == [[3]]


def test_what_waited_while_the_model_was_busy_goes_together(batcher, run):
    run.go.clear()
    first = batcher.submit(0)
    assert run.began.wait(5)
    rest = [batcher.submit(i) for i in range(1, 7)]
    assert batcher.waiting == 6
    run.go.set()
    assert [f.result(5) for f in [first, *rest]] == [2 * i for i in range(7)]
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_cancelled_item_is_left_out(batcher, run):
    run.go.clear()
    batcher.submit(0)
    assert run.began.wait(5)
    gone, stays = batcher.submit(1), batcher.submit(2)
    assert gone.cancel()
    run.go.set()
    assert stays.result(5) == 4
    with pytest.raises(CancelledError):
        gone.result(1)
    assert run.batches == [[0], [2]]


def test_a_failing_batch_fails_alone(batcher):
    with pytest.raises(ValueError, match="minus one"):
        batcher.submit(-1).result(5)
    assert batcher.submit(1).result(5) == 2
    assert batcher.alive


def test_stopping_answers_what_is_queued(run):
    batcher = Batcher(run, max_batch=2, max_wait=0)
    batcher.start()
    futures = [batcher.submit(i) for i in range(9)]
    batcher.stop()
    assert [f.result(0) for f in futures] == [2 * i for i in range(9)]
    assert not batcher.alive
    with pytest.raises(RuntimeError, match="not running"):
        batcher.submit(1)


def test_a_failing_warm_up_is_raised(run):
    with pytest.raises(ValueError, match="minus one"):
        Batcher(run).start([[1], [-1]])


@settings(max_examples=20)
@given(items=st.lists(st.integers(0, 99), max_size=40), size=st.integers(1, 9), wait=st.sampled_from([0, 0.001]))
def test_everyone_gets_their_own_answer(items, size, wait):
    run, counted = Doubling(), []
    batcher = Batcher(run, max_batch=size, max_wait=wait, on_batch=lambda n, seconds, results: counted.append(n))
    batcher.start()
    futures = [batcher.submit(item) for item in items]
    batcher.stop()
    assert [f.result(0) for f in futures] == [2 * item for item in items]
    assert [item for batch in run.batches for item in batch] == items
    assert counted == [len(batch) for batch in run.batches]
    assert max(counted, default=1) <= size
    assert len(run.threads) <= 1
