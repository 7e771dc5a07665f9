"""Every format that arrives is decoded to what the model expects, or refused with a reason."""

from __future__ import annotations

import io
import os
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from ltmp.data import images
from ltmp.data.images import MAX_SCANS, UnfitImageError, decode, is_image_name, open_part, read_image, reason
from ltmp.errors import LTMPError


def encoded(image: Image.Image, form: str = "PNG", **options) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    ("mode", "pixel", "form", "expected"),
    [
        ("L", 90, "PNG", (90, 90, 90)),
        ("1", 1, "PNG", (255, 255, 255)),
        ("LA", (90, 10), "PNG", (90, 90, 90)),
        ("RGBA", (10, 20, 30, 0), "PNG", (10, 20, 30)),
        ("CMYK", (255, 0, 0, 0), "TIFF", (0, 255, 255)),
        ("RGB", (10, 20, 30), "BMP", (10, 20, 30)),
    ],
    ids=["grey", "bilevel", "grey-alpha", "rgba", "cmyk", "rgb"],
)
def test_modes_become_rgb(mode, pixel, form, expected):
    decoded = decode(encoded(Image.new(mode, (4, 3), pixel), form))
    assert (decoded.mode, decoded.size, decoded.getpixel((0, 0))) == ("RGB", (4, 3), expected)


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 100, 100), (65535, 255)])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(value, expected, form):
    sixteen = Image.fromarray(np.full((3, 4), value, dtype=np.uint16))
    assert decode(encoded(sixteen, form)).getpixel((0, 0)) == (expected,) * 3


def test_integers_outside_16_bits_are_refused():
    with pytest.raises(ValueError, match="65,535"):
        decode(encoded(Image.fromarray(np.full((3, 4), 70000, dtype=np.int32)), "TIFF"))


def test_floating_point_pixels_are_refused():
    with pytest.raises(ValueError, match="8 or 16 bits"):
        decode(encoded(Image.fromarray(np.full((3, 4), np.nan, dtype=np.float32)), "TIFF"))


def test_palette_with_transparency_raises_no_warning():
    palette = Image.new("RGB", (4, 4), (10, 20, 30)).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(encoded(palette, transparency=bytes([0] * 256)))
    assert decoded.mode == "RGB"


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees
    assert decode(encoded(image, "JPEG", exif=exif)).size == (4, 6)


def test_greyscale_mode_for_models_of_one_channel():
    assert decode(encoded(colour := Image.new("RGB", (4, 4), (9, 9, 9))), "L").mode == "L"
    assert decode(colour, "L").getpixel((0, 0)) == 9


def test_large_jpeg_is_decoded_at_reduced_size(monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000 * 1000)
    monkeypatch.setattr(images, "DRAFT_SIZE", (256, 256))
    decoded = decode(encoded(Image.new("RGB", (2048, 1024)), "JPEG"))
    assert decoded.size == (512, 256)


def test_image_over_pillows_limit_has_a_plain_reason(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    with pytest.raises(Image.DecompressionBombError) as caught:
        decode(encoded(Image.new("1", (2000, 2000))))
    assert reason(caught.value) == "over the limit of 2 megapixels"


def test_bytes_that_are_no_image_have_a_plain_reason():
    with pytest.raises(Image.UnidentifiedImageError) as caught:
        decode(io.BytesIO(b"hello"))
    assert reason(caught.value) == "not an image, or in a format Pillow does not know"


def test_truncated_image_is_not_filled_up():
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG").getvalue()
    with pytest.raises(OSError, match="truncated"):
        decode(io.BytesIO(whole[: len(whole) // 2]))


def test_stripes_are_refused_before_they_are_resized_to_gigabytes():
    with pytest.raises(ValueError, match="4 x 201 pixels: over 50 times longer than wide"):
        decode(encoded(Image.new("RGB", (4, 201))))
    assert decode(encoded(Image.new("RGB", (4, 200)))).size == (4, 200)


def test_formats_that_pillow_has_other_programs_read_are_not_tried():
    with pytest.raises(Image.UnidentifiedImageError):
        decode(encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_exif_that_cannot_be_rewritten_loses_no_image(monkeypatch):
    def fail(*_):
        raise ValueError("cannot be written")

    image, exif = Image.new("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    file = encoded(image, "JPEG", exif=exif)
    monkeypatch.setattr(Image.Exif, "tobytes", fail)
    assert decode(file).size == (4, 6)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_the_image_as_it_is(exif, form):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert decode(encoded(Image.new("RGB", (6, 4)), form, exif=exif)).size == (6, 4)


def scans(count: int, size: tuple[int, int] = (64, 64)) -> bytes:
    """A progressive JPEG with `count` more scans, which say nothing."""
    whole = encoded(Image.effect_noise(size, 50).convert("RGB"), "JPEG", progressive=True).getvalue()
    empty = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00" + b"\x00\x00"
    return whole[:-2] + empty * count + b"\xff\xd9"


def test_jpegs_of_endless_scans_are_refused_before_they_are_decoded():
    encoded, start = io.BytesIO(scans(20_000, (1024, 1024))), time.process_time()
    with pytest.raises(ValueError, match="over 100 scans"):
        decode(encoded)
    assert time.process_time() - start < 1
    assert decode(io.BytesIO(scans(MAX_SCANS // 2))).size == (64, 64)


@pytest.mark.parametrize(
    "before",
    [
        b"\xff" * 20_000_000,
        bytes(20_000_000),
        (b"\xff\xe1\xff\xfdExif\0\0" + bytes(65_525)) * 1000,
        b"\xff\xe9\x00\x02" * 500_000,
        (b"\xff\xe9\x00\x02" + bytes(50_000)) * 200,
    ],
    ids=["fill", "junk", "exif", "segments", "junk between"],
)
def test_headers_that_take_minutes_are_refused_before_they_are_read(before):
    whole, start = encoded(Image.new("RGB", (64, 64)), "JPEG").getvalue(), time.process_time()
    with pytest.raises(UnfitImageError, match="a header of more bytes"):
        decode(io.BytesIO(whole[:2] + before + whole[2:]))
    assert time.process_time() - start < 1


def test_images_that_take_minutes_are_given_up(monkeypatch):
    monkeypatch.setattr(images, "MAX_SECONDS", 0.2)
    slow = b"P6\n" + b"#a\n" * 5_000_000 + b"8 8 255\n" + bytes(192)
    start = time.process_time()
    with pytest.raises(UnfitImageError, match=r"takes over 0\.2 seconds"):
        decode(io.BytesIO(slow))
    assert time.process_time() - start < 2
    assert decode(encoded(Image.new("RGB", (4, 4)))).size == (4, 4)


def test_headers_as_cameras_write_them_are_read():
    profile = b"".join(b"\xff\xe2\xff\xfdICC_PROFILE\0" + bytes([n + 1, 255]) + bytes(65_517) for n in range(255))
    whole = encoded(Image.new("RGB", (64, 64)), "JPEG").getvalue()
    assert decode(io.BytesIO(whole[:2] + profile + b"\xff" * 1000 + whole[2:])).size == (64, 64)
    for end in range(2, len(whole)):
        images._check_header(io.BytesIO(whole[:end]))


def test_scans_of_thumbnails_and_what_follows_the_image_do_not_count():
    whole = encoded(Image.effect_noise((64, 64), 50), "JPEG", exif=b"Exif\0\0" + b"\xff\xda" * 500).getvalue()
    assert decode(io.BytesIO(whole + b"\xff\xda" * 500)).size == (64, 64)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(200 * 10**9)
    for name, why in (("pipe", "not a regular file"), ("zero", "not a regular file"), ("sparse", "200.0 GB are over")):
        with pytest.raises(LTMPError, match=why):
            read_image(tmp_path / f"{name}.png")
    with pytest.raises(IsADirectoryError):
        open_part(tmp_path)


def test_names_of_images():
    assert all(map(is_image_name, ("a.JPG", "x/y.webp", "./a.tif", "../b.gif", "a.b.png")))
    assert not any(map(is_image_name, (".a.png", "._a.png", ".x/a.png", "a.txt", "png", "a/.b/c.png")))


@pytest.mark.parametrize(
    ("kind", "how"),
    [("PNG", {}), ("WEBP", {}), ("JPEG", {"progressive": True}), ("TIFF", {}), ("BMP", {}), ("JPEG2000", {})],
)
def test_what_takes_much_memory_is_refused_by_its_header(kind, how, monkeypatch):
    file = encoded(Image.new("RGB", (600, 400)), kind, **how)
    assert decode(file).size == (600, 400)
    monkeypatch.setattr(images, "MAX_DECODED", 700_000)
    monkeypatch.setattr(Image.Image, "load", None)
    with pytest.raises(UnfitImageError, match=f"600 x 400 pixels of {kind} take .* to decode"):
        decode(file)


@pytest.mark.parametrize(
    ("kind", "form", "size", "fits"),
    [
        ("P", "PNG", (94_000, 1890), True),
        ("RGB", "PNG", (81_000, 1640), False),
        ("RGBA", "PNG", (81_000, 1640), False),
        ("RGB", "PNG", (11_000, 11_000), True),
        ("I", "TIFF", (81_000, 1640), False),
        ("RGB", "JPEG", (60_000, 1300), True),
        ("RGB", "JPEG", (13_000, 13_000), True),
    ],
)
def test_memory_is_counted_in_bytes_of_all_copies(kind, form, size, fits):
    image = Image.Image()
    image._mode, image._size, image.format = kind, size, form
    if fits:
        images._check_memory(image, "RGB")
    else:
        with pytest.raises(UnfitImageError, match=f"pixels of {form} take"):
            images._check_memory(image, "RGB")


@pytest.mark.parametrize("rows", [10, 400])
def test_a_strip_that_is_decompressed_whole_counts(rows, monkeypatch):
    file = encoded(Image.new("RGB", (600, 400)), "TIFF", compression="tiff_deflate", tiffinfo={278: rows})
    monkeypatch.setattr(images, "MAX_DECODED", 1_000_000)
    if rows == 10:
        assert decode(file).size == (600, 400)
    else:
        with pytest.raises(UnfitImageError, match="600 x 400 pixels of TIFF"):
            decode(file)


@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "I;16", "I", "CMYK"])
def test_pieces_are_converted_as_the_whole_is_and_thin_images_reduced(kind, monkeypatch):
    wide = Image.effect_noise((700, 20), 90)
    if kind.startswith("I"):
        image = Image.fromarray(np.asarray(wide).astype({"I": np.int32, "I;16": np.uint16}[kind]) * 257)
    else:
        image = wide.convert("RGB").convert(kind)
    file = encoded(image, "TIFF")
    whole = decode(file)
    monkeypatch.setattr(images, "PIECE", 1500)
    assert decode(file).tobytes() == whole.tobytes()
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    assert decode(file).tobytes() == whole.reduce(2).tobytes()


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["L", "LA", "RGB", "RGBA", "P", "I;16", "CMYK"])
def test_large_images_are_reduced_piece_by_piece_to_what_they_are(kind, mode, monkeypatch):
    smooth = Image.effect_noise((7, 5), 90).convert("RGB").resize((700, 500), Image.Resampling.BICUBIC)
    if kind == "I;16":
        image = Image.fromarray(np.asarray(smooth.convert("L")).astype(np.uint16) * 257)
    else:
        image = smooth.convert(kind)
    name = "PNG" if kind != "CMYK" else "TIFF"
    whole = decode(encoded(image, name), mode)
    monkeypatch.setattr(images, "LARGE_PIXELS", 1000)
    monkeypatch.setattr(images, "DRAFT_SIZE", (125, 125))
    small = decode(encoded(image, name), mode)
    assert (small.size, small.mode) == ((175, 125), mode)
    assert np.abs(np.asarray(small, int) - np.asarray(whole.reduce(4), int)).max() <= 1


def test_large_files_are_decoded_from_where_they_lie(tmp_path, monkeypatch):
    image = Image.effect_noise((64, 48), 90)
    for kind in ("PNG", "TIFF", "BMP", "WEBP", "GIF", "JPEG"):
        data = encoded(image, kind).read()
        path = tmp_path / f"image.{kind}"
        path.write_bytes(b"before" + data + bytes(5000))
        monkeypatch.undo()
        expected = decode(open_part(path, 6, len(data)))
        monkeypatch.setattr(images, "LARGE_BYTES", 100)
        with open_part(path, 6, len(data) + 5000) as file:
            assert not isinstance(file, io.BytesIO)
            assert decode(file).tobytes() == expected.tobytes()
        with open_part(path, 6, len(data)) as file:
            assert file.read() == data
    with pytest.raises(ValueError, match="empty"):
        open_part(path, 0, 0)
