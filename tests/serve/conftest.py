"""A tiny reduced model as a service: in this process, or on a socket of its own thread."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers import attach_reducing, random_images, tiny_vit
from ltmp.serve import Deployment, Limits

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from starlette.testclient import TestClient

from ltmp.serve.endpoints import create_app
from ltmp.serve.server import bind, make_server


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = (20, 18), mode: str = "RGB") -> bytes:
    """An encoded image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="session")
def deployment() -> Deployment:
    return Deployment(attach_reducing(tiny_vit(), random_images(8)), names=["ant", "bee", "cow", "dog", "elk"])


@pytest.fixture
def client(deployment) -> Iterator[TestClient]:
    """The service with its default limits."""
    with TestClient(create_app(deployment, about={"target": 0.6})) as client:
        yield client


@contextmanager
def serving(deployment: Any, limits: Limits) -> Iterator[tuple[str, int, Any]]:
    """Host, port and service of a real server in a thread."""
    app = create_app(deployment, limits)
    server, bound = make_server(app), bind("127.0.0.1", 0)
    host, port = bound.getsockname()[:2]
    thread = Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        yield host, port, app.state.service
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
