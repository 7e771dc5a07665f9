"""On a socket: slow and silent clients are cut off, and a signal ends the service when everything is answered."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest

from ltmp.cli import main
from ltmp.errors import LTMPError, MissingExtraError
from ltmp.serve import Limits
from ltmp.serve.server import JsonLines, bind

from .conftest import picture, serving

QUICK = Limits(read_timeout=0.4, max_connections=8, max_body=50_000)
HEAD = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\n"


def say(host: str, port: int, *parts: bytes, pause: float = 0.0, patience: float = 5.0) -> bytes:
    """Send parts with pauses and return everything that comes back until the server closes."""
    with closing(socket.create_connection((host, port), timeout=patience)) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        answer = b""
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


@pytest.fixture(scope="module")
def address(deployment):
    with serving(deployment, QUICK) as (host, port, _service):
        yield host, port


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.01)


def still_fine(address) -> None:
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request("POST", "/v1/predict", picture(), {"content-type": "image/png"})
    assert connection.getresponse().status == 200
    connection.close()


def test_silent_clients_are_cut_off(address):
    start = time.perf_counter()
    assert say(*address) == b""
    assert time.perf_counter() - start < 3
    still_fine(address)


def test_slow_headers_are_cut_off(address):
    # a byte now and then does not start the clock anew
    start = time.perf_counter()
    assert say(*address, *(bytes([byte]) for byte in HEAD[:20]), pause=0.1) == b""
    assert time.perf_counter() - start < 4
    still_fine(address)


def test_a_slow_body_is_answered_408(address):
    answer = say(*address, HEAD + b"content-length: 1000\r\n\r\n", *[b"x"] * 8, pause=0.1)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"slow-client"' in answer
    assert b"connection: close" in answer.lower()
    still_fine(address)


def test_a_declared_body_that_is_too_large_is_answered_at_once(address):
    answer = say(*address, HEAD + b"connection: close\r\ncontent-length: 99999999999\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    still_fine(address)


def test_an_endless_body_is_answered_when_it_is_too_large(address):
    chunk = b"2710\r\n" + bytes(10_000) + b"\r\n"
    answer = say(*address, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 40, pause=0.02)
    assert answer.startswith(b"HTTP/1.1 413 ")
    still_fine(address)


def test_what_is_sent_after_a_refusal_does_not_keep_the_connection(address):
    start = time.perf_counter()
    head = HEAD.replace(b"image/png", b"text/html") + b"content-length: 40000\r\n\r\n"
    assert say(*address, head, *[b"x"] * 30, pause=0.05).startswith(b"HTTP/1.1 415 ")
    assert time.perf_counter() - start < 4
    still_fine(address)


def test_a_connection_is_used_again_after_a_refusal(address):
    with closing(http.client.HTTPConnection(*address, timeout=30)) as connection:
        for content_type, status in (("text/html", 415), ("image/png", 200)):
            connection.request("POST", "/v1/predict", picture(), {"content-type": content_type})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == status


RUBBISH = (
    b"\x16\x03\x01\x02\x00\x01",
    b"GET\r\n\r\n",
    b"POST /v1/predict HTTP/1.1\r\n\r\n",
    HEAD + b"content-length: -1\r\n\r\n",
    HEAD + b"content-length: 3\r\ncontent-length: 5\r\n\r\n",
    HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
    HEAD + b"x: " + bytes(100_000) + b"\r\n\r\n",
)


@pytest.mark.parametrize("rubbish", RUBBISH)
def test_what_is_not_http_is_a_400(address, rubbish):
    assert say(*address, rubbish).startswith(b"HTTP/1.1 400 ")
    still_fine(address)


def test_more_connections_than_allowed_are_turned_away(deployment):
    with serving(deployment, Limits(max_connections=3)) as address:
        host, port, _service = address
        # an answer shows that the connection is counted
        idle = [http.client.HTTPConnection(host, port, timeout=30) for _ in range(3)]
        assert [asked(connection) for connection in idle] == [200] * 3
        assert say(host, port).startswith(b"HTTP/1.1 503 ")
        for connection in idle:
            connection.close()
        wait_until(lambda: asked(http.client.HTTPConnection(host, port, timeout=30)) == 200)
        still_fine((host, port))


def asked(connection: http.client.HTTPConnection) -> int:
    """The status of an answer that leaves the connection open."""
    connection.request("GET", "/v1/info")
    answer = connection.getresponse()
    answer.read()
    return answer.status


def test_clients_that_leave_free_their_places(deployment):
    # the window is long: the images still wait when their clients leave
    with serving(deployment, Limits(max_wait=1.0, max_queue=4)) as (host, port, service):
        request = HEAD + b"content-length: %d\r\n\r\n" % len(picture()) + picture()
        for _ in range(3):
            connections = [socket.create_connection((host, port)) for _ in range(4)]
            for connection in connections:
                connection.sendall(request)
            wait_until(lambda: service.in_flight == 4)
            for connection in connections:
                connection.close()
            wait_until(lambda: service.in_flight == 0)
        text = service.metrics.text().decode()
        assert 'ltmp_requests_total{path="/v1/predict",status="499"} 12.0' in text
        still_fine((host, port))
        assert "ltmp_batch_size_sum 1.0" in service.metrics.text().decode()


def test_32_connections_never_fill_the_default_queue(deployment):
    with serving(deployment, Limits()) as (host, port, _service):

        def client(_number: int) -> set[int]:
            with closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
                statuses = set()
                for seed in range(5):
                    connection.request("POST", "/v1/predict", picture(seed), {"content-type": "image/png"})
                    answer = connection.getresponse()
                    answer.read()
                    statuses.add(answer.status)
                return statuses

        with ThreadPoolExecutor(32) as pool:
            assert set().union(*pool.map(client, range(32))) == {200}


def test_a_taken_port_is_said():
    taken = bind("127.0.0.1", 0)
    with closing(taken), pytest.raises(LTMPError, match=r"cannot listen on 127.0.0.1 port \d+: .*choose another"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(LTMPError, match=r"cannot listen on not.a.host.invalid"):
        bind("not.a.host.invalid", 0)


def test_logs_as_json():
    record = logging.makeLogRecord({"msg": "hello %s", "args": ("you",), "levelname": "INFO", "path": "/healthz"})
    line = JsonLines().format(record)
    assert "\n" not in line
    values = json.loads(line)
    assert (values["message"], values["level"], values["path"]) == ("hello you", "info", "/healthz")


def test_missing_extra_is_said(monkeypatch):
    import ltmp.serve

    for name in [name for name in sys.modules if name.startswith("ltmp.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtraError, match=r"ltmp\[serve\]"):
        _ = ltmp.serve.create_app


def test_help_teaches(capsys):
    assert main(["serve", "--help"]) == 0
    assert "curl" in capsys.readouterr().out


def test_a_start_that_fails_leaves_no_socket_open(tmp_path, monkeypatch, capsys):
    model, weights, thresholds = save_model(tmp_path)
    opened = []
    monkeypatch.setattr("ltmp.serve.bind", lambda *address: opened.append(bind(*address)) or opened[0])
    arguments = ["serve", *model, "--weights", weights, "--thresholds", thresholds, "--port", "0", "--budget", "0.01"]
    assert main(list(map(str, arguments))) == 2
    assert "budget" in capsys.readouterr().err
    assert [one.fileno() for one in opened] == [-1]


def test_a_taken_port_leaves_no_socket_open(monkeypatch):
    opened = []

    class Seen(socket.socket):
        def __init__(self, *how):
            super().__init__(*how)
            opened.append(self)

    with closing(bind("127.0.0.1", 0)) as taken:
        monkeypatch.setattr("ltmp.serve.server.socket.socket", Seen)
        with pytest.raises(LTMPError, match="cannot listen"):
            bind("127.0.0.1", taken.getsockname()[1])
    assert [one.fileno() for one in opened] == [-1]


@pytest.mark.slow
def test_serve_from_the_command_line_until_sigterm(tmp_path):
    """The whole way: a port of its own, an answer, and a stop that finishes what is queued and exits with 0."""
    model, weights, thresholds = save_model(tmp_path)
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncow\n")
    # images wait a second for others, so that some are queued when the signal comes
    arguments = ["serve", *model, "--weights", weights, "--thresholds", thresholds, "--class-map", names]
    options = ["--port", "0", "--max-wait", "1000", "--json-logs", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ltmp.cli", *map(str, arguments), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        host, port = process.stdout.readline().split("http://")[1].split(" ")[0].split(":")
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(predict_once, host, int(port)) for _ in range(4)]
            time.sleep(0.3)
            wait_until_inside(host, int(port), 4)
            process.send_signal(signal.SIGTERM)
            assert [answer.result(20)[0] for answer in answers] == [200] * 4
            assert answers[0].result()[1]["predictions"][0]["label"] in ("ant", "bee", "cow")
        logs = process.communicate(timeout=20)[1]
        assert process.returncode == 0
    finally:
        process.kill()
    lines = [json.loads(line) for line in logs.splitlines()]
    assert sum(line.get("path") == "/v1/predict" and line["status"] == "200" for line in lines) == 4
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


def predict_once(host: str, port: int) -> tuple[int, dict]:
    with closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
        connection.request("POST", "/v1/predict?top_k=1", picture(), {"content-type": "image/png"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def wait_until_inside(host: str, port: int, count: int) -> None:
    for _ in range(100):
        with closing(http.client.HTTPConnection(host, port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            if f"ltmp_requests_in_flight {count}.0" in connection.getresponse().read().decode():
                return
        time.sleep(0.01)
    raise AssertionError(f"never {count} at once")


def save_model(folder):
    """Options, weights and thresholds of a tiny model."""
    import timm
    import torch
    from safetensors.torch import save_file

    import ltmp

    shape = {"patch_size": 8, "embed_dim": 24, "depth": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **shape)
    save_file(model.state_dict(), folder / "model.safetensors")
    ltmp.save(ltmp.attach(model), folder / "thresholds.safetensors", model_name="vit_tiny_patch16_224")
    options = ["--img-size", 32, "--num-classes", 3, "--model-kwargs", " ".join(f"{k}={v}" for k, v in shape.items())]
    return options, folder / "model.safetensors", folder / "thresholds.safetensors"


def flood(host: str, port: int, chunks: int) -> float:
    """Seconds until the server has had enough of a body in chunks of one byte."""
    start = time.perf_counter()
    say(host, port, HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * chunks, patience=20)
    return time.perf_counter() - start


@pytest.mark.parametrize("together", [True, False])
def test_bodies_in_crumbs_delay_nobody(deployment, together):
    with serving(deployment, Limits()) as (host, port, _service), ThreadPoolExecutor(16) as pool:
        floods = [pool.submit(flood, host, port, 400_000) for _ in range(16)]
        time.sleep(0.2 if together else 0)
        start = time.perf_counter()
        still_fine((host, port))
        assert time.perf_counter() - start < 5
        assert max(one.result(30) for one in floods) < 15


def test_crumbs_behind_an_earlier_request_are_counted_too(address):
    request = HEAD + b"content-length: %d\r\n\r\n" % len(picture()) + picture()
    answer = say(*address, request + HEAD + b"transfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1 ") <= 2
    still_fine(address)


def test_bodies_in_chunks_of_a_sensible_size_are_taken(address):
    body = picture()
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (body[i : i + 200] for i in range(0, len(body), 200))
    )
    answer = say(*address, HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")


def test_requests_sent_at_once_are_answered_in_turn(address):
    request = HEAD + b"content-length: %d\r\n\r\n" % len(picture()) + picture()
    last = request.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n")
    assert say(*address, request * 5 + last).count(b"HTTP/1.1 200 ") == 6


def test_clients_that_never_read_are_cut_off(deployment):
    with serving(deployment, Limits(read_timeout=0.4, max_connections=4)) as (host, port, _service):
        silent = []
        for _ in range(4):
            connection = socket.create_connection((host, port))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(0.3)
            with suppress(OSError):
                for _ in range(2000):
                    connection.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n" * 20)
            silent.append(connection)
        wait_until(lambda: not service_is_full(host, port))
        for connection in silent:
            connection.close()


def service_is_full(host: str, port: int) -> bool:
    return say(host, port, b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 503 "
    )


def test_two_lengths_close_the_connection(address):
    both = b"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
    answer = say(*address, both + b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_headers_are_limited_in_number(address):
    answer = say(*address, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 2000 + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert say(*address, b"GET /healthz HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 10_000 + b"\r\n")[9:10] == b"4"
    still_fine(address)
