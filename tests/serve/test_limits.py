"""Images are opened by their header, and only the formats that are meant."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ltmp.errors import UsageError
from ltmp.serve import Limits
from ltmp.serve.limits import MEDIA_TYPES, check_media_type, read_image
from ltmp.serve.problems import STATUS, ProblemError

from .conftest import picture

PIXELS = 1_000_000


def refused(body: bytes) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        read_image(body, "RGB", PIXELS)
    return caught.value


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", MEDIA_TYPES.values())
def test_each_format_is_read(kind):
    image = read_image(picture(kind=kind), "RGB", PIXELS)
    assert (image.size, image.mode) == ((20, 18), "RGB")


def test_grey_models_get_grey():
    assert read_image(picture(), "L", PIXELS).mode == "L"


@pytest.mark.parametrize("kind", ["TIFF", "PPM", "ICO", "JPEG2000", "EPS"])
def test_other_formats_are_not_even_tried(kind):
    assert refused(picture(kind=kind)).code == "unreadable-image"


@pytest.mark.parametrize("size", [(1001, 1000), (10_000, 9_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_by_its_header(size):
    tracemalloc.start()
    problem = refused(png_header(*size))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problem.status in (413, 422)
    assert "megapixels" in problem.detail or size[0] == 2**31 - 1
    assert peak < 1_000_000


def test_a_long_thin_image_is_refused():
    # 1 x 5000 pixels are few, until the shorter side is resized to the model's
    assert "50 times" in refused(picture(size=(1, 5000))).detail
    assert read_image(picture(size=(10, 500)), "RGB", PIXELS).size == (10, 500)


def test_an_empty_body_is_said():
    assert refused(b"").code == "empty-body"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_said(kind):
    body = picture(kind=kind, size=(200, 180))
    assert refused(body[: len(body) // 2]).code == "unreadable-image"


@settings(max_examples=100)
@given(data=st.data(), kind=st.sampled_from(list(MEDIA_TYPES.values())))
def test_damage_is_refused_or_read_never_worse(data, kind):
    body = bytearray(picture(kind=kind))
    for _ in range(data.draw(st.integers(1, 20))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    # anything but a refusal or an image within its limits fails the test
    with suppress(ProblemError):
        image = read_image(bytes(body), "RGB", PIXELS)
        assert image.width * image.height <= PIXELS


@given(body=st.binary(max_size=200))
def test_any_bytes_are_refused(body):
    assert refused(body).status in (400, 413, 422)


@pytest.mark.parametrize(
    "header",
    ["image/jpeg", "IMAGE/PNG", "image/webp; q=1", "application/octet-stream", "image/jpg", None, "",
     "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"],
)  # fmt: skip
def test_media_types_taken(header):
    check_media_type(header)


@pytest.mark.parametrize(
    "header", ["text/html", "image/svg+xml", "multipart/mixed; boundary=x", "image/", "application/json"]
)
def test_media_types_refused(header):
    with pytest.raises(ProblemError) as caught:
        check_media_type(header)
    assert caught.value.status == 415


def test_every_problem_has_a_clean_body():
    for code, status in STATUS.items():
        body = ProblemError(code, "what to do").body()
        assert (body["status"], body["code"], body["detail"]) == (status, code, "what to do")


@pytest.mark.parametrize("wrong", [{"max_queue": 0}, {"timeout": -1}, {"max_wait": -0.1}, {"max_body": 0}])
def test_limits_must_make_sense(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Limits(**wrong)


def test_an_animation_counts_by_its_first_image():
    file = io.BytesIO()
    frames = [Image.new("RGB", (10, 10), color) for color in ("red", "green", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    assert read_image(file.getvalue(), "RGB", PIXELS).getpixel((0, 0))[0] > 200
