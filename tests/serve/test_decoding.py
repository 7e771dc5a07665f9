"""An image that takes too long, or takes its decoder down, costs itself and no other, also when the service stops."""

from __future__ import annotations

import asyncio
import http.client
import io
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from PIL import Image

from ltmp.serve import Deployment, Limits
from ltmp.serve.answers import prepare
from ltmp.serve.decoding import Decoders
from ltmp.serve.problems import ProblemError

from .conftest import picture, serving


def work(body: bytes) -> torch.Tensor:
    """Does what its body says."""
    order, _, number = body.partition(b" ")
    if order == b"sleep":
        time.sleep(float(number))
    if order == b"die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if order == b"refuse":
        raise ProblemError("too-many-pixels", "no", {"x": "y"})
    if order == b"fail":
        raise ZeroDivisionError("of zero")
    return torch.tensor([len(body), os.getpid()])


@pytest.fixture
def decoders():
    decoders = Decoders(work, 2, timeout=0.5)
    decoders.start()
    yield decoders
    decoders.stop()


def decode(decoders, body: bytes, seconds: float = 10.0) -> list[int]:
    return asyncio.run(decoders.decode(body, time.monotonic() + seconds)).tolist()


def code(decoders, body: bytes, seconds: float = 10.0) -> str:
    with pytest.raises(ProblemError) as caught:
        decode(decoders, body, seconds)
    return caught.value.code


def test_images_come_from_another_process(decoders):
    length, process = decode(decoders, b"hello")
    assert length == 5
    assert process != os.getpid()


def test_refusals_come_back_whole(decoders):
    with pytest.raises(ProblemError) as caught:
        decode(decoders, b"refuse")
    assert (caught.value.code, caught.value.detail, caught.value.headers) == ("too-many-pixels", "no", {"x": "y"})
    with pytest.raises(RuntimeError, match="ZeroDivisionError: of zero"):
        decode(decoders, b"fail")


@pytest.mark.parametrize(("order", "wanted"), [(b"sleep 60", "timeout"), (b"die", "unreadable-image")])
def test_a_process_that_does_not_answer_is_replaced(decoders, order, wanted):
    start = time.perf_counter()
    for _ in range(3):
        assert code(decoders, order) == wanted
        assert decode(decoders, b"hello")[0] == 5
    assert time.perf_counter() - start < 5


def test_no_time_left_is_no_decoding(decoders):
    assert code(decoders, b"hello", seconds=-1) == "timeout"
    start = time.perf_counter()
    assert code(decoders, b"sleep 60", seconds=0.1) == "timeout"
    assert time.perf_counter() - start < 0.5


def test_stopping_waits_for_nobody():
    decoders = Decoders(work, 1, timeout=60)

    async def stop_meanwhile() -> None:
        slow = asyncio.ensure_future(decoders.decode(b"sleep 60", time.monotonic() + 60))
        await asyncio.sleep(0.2)
        decoders.hurry(0.2)
        with pytest.raises(ProblemError, match="too long"):
            await slow

    start = time.perf_counter()
    asyncio.run(stop_meanwhile())
    decoders.stop()
    assert time.perf_counter() - start < 3


def test_processes_hold_no_connection_of_clients(deployment):
    here, there = socket.socketpair()
    decoders = Decoders(partial(prepare, deployment.transform, deployment.mode, 10**6), 1, timeout=30)
    decoders.start()
    assert asyncio.run(decoders.decode(picture(), time.monotonic() + 30)).shape == (3, 16, 16)
    there.close()
    here.settimeout(30)
    assert here.recv(1) == b""
    decoders.stop()


def endless(scans: int = 20_000) -> bytes:
    """A progressive JPEG of 3000 x 3000 pixels with empty scans: seconds for each hundred of them."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((3000, 3000, 3), np.uint8)).save(file, "JPEG", progressive=True)
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00\x00\x00"
    return file.getvalue()[:-2] + scan * scans + b"\xff\xd9"


def send(host: str, port: int, body: bytes) -> int:
    with closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
        connection.request("POST", "/v1/predict", body)
        return connection.getresponse().status


def test_a_service_that_is_stopped_gives_decoding_seconds_not_minutes(deployment, monkeypatch):
    monkeypatch.setattr(Decoders, "hurry", partialmethod(Decoders.hurry, 0.3))
    slow = Deployment(deployment.model, transform=partial(sleepy, deployment.transform))
    with ThreadPoolExecutor(2) as pool:
        with serving(slow, Limits(timeout=60, decode_timeout=60)) as (host, port, service):
            sent = [pool.submit(send, host, port, picture()) for _ in range(2)]
            while service.in_flight < 2:
                time.sleep(0.01)
            start = time.perf_counter()
        assert time.perf_counter() - start < 5
        assert [one.result(30) for one in sent] == [504, 504]


def sleepy(transform, image):
    """Images of a certain size take a minute."""
    time.sleep(60 if image.size == (20, 18) else 0)
    return transform(image)


def test_jpegs_of_endless_scans_block_nobody(deployment):
    with serving(deployment, Limits(timeout=5)) as (host, port, _service):
        start = time.perf_counter()
        for body, status in ((endless(), 422), (endless(), 422), (picture(), 200)):
            connection = http.client.HTTPConnection(host, port, timeout=10)
            connection.request("POST", "/v1/predict", body)
            answer = connection.getresponse()
            assert answer.status == status
            assert status == 200 or b"over 100 scans" in answer.read()
            connection.close()
        assert time.perf_counter() - start < 4
