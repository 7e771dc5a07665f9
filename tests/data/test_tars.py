"""A damaged member of a tar costs itself and no other; links are followed; nothing is looped over or read for ever."""

from __future__ import annotations

import io
import tarfile
import time
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import colour_image
from ltmp.data import Broken, open_dataset
from ltmp.data.tars import open_content, tar_images
from ltmp.errors import LTMPError


def png(number: int) -> bytes:
    file = io.BytesIO()
    colour_image((number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def member(name: str, data: bytes = b"", **settings) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in settings.items():
        setattr(info, key, value)
    return info, data


def write(path: Path, *members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar whose headers say what they are told to."""
    with path.open("wb") as file:
        for info, data in members:
            file.write(info.tobuf(form) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))
    return path


def found(path: Path) -> list[tuple[str, bytes | None]]:
    result = []
    for one in tar_images(str(path)):
        try:
            data = None if isinstance(one.content, Broken) else open_content(one.content).read()
        except ValueError:
            data = None
        result.append((one.name, data))
    return result


def resealed(header: bytes) -> bytes:
    """A header with the checksum that its bytes have."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + f"{sum(header):06o}\0 ".encode() + header[156:]


def test_links_are_followed(tmp_path):
    path = write(
        tmp_path / "a.tar",
        member("a/0.png", b"A"),
        member("a/1.png", type=tarfile.LNKTYPE, linkname="a/0.png"),
        member("b/2.png", type=tarfile.SYMTYPE, linkname="../a/1.png"),
        member("b/3.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("b/4.png", type=tarfile.SYMTYPE, linkname="4.png"),
        member("b/5.png", type=tarfile.LNKTYPE, linkname="z.bin"),
        member("z.bin", b"Z"),
    )
    names = ["a/0.png", "a/1.png", "b/2.png", "b/3.png", "b/4.png", "b/5.png"]
    assert found(path) == list(zip(names, [b"A", b"A", b"A", None, None, b"Z"], strict=True))


@pytest.mark.parametrize("size", [2**80, 2**40, -512, -(2**62)])
@pytest.mark.parametrize("name", ["1.png", "notes.txt"])
def test_a_size_that_cannot_be_costs_its_own_member(size, name, tmp_path):
    info, _ = member(name)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = (
        b"\x80" + size.to_bytes(11, "big") if size > 0 else b"\xff" + size.to_bytes(11, "big", signed=True)
    )
    path = write(tmp_path / "a.tar", member("0.png", b"A"), member("2.png", b"C"))
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + resealed(bytes(header)) + b"B" * 512 + whole[1024:])
    assert [data for _, data in found(path) if data] == [b"A", b"C"]
    assert [name for name, data in found(path) if data is None] == (["1.png"] if name == "1.png" else [])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "record", [b"GNU.sparse.size=many", b"GNU.sparse.map=a,b", b"GNU.sparse.numblocks=x", b"size=-7"]
)
def test_a_pax_header_that_cannot_be_costs_its_own_member(record, first, tmp_path):
    line = b"%d %s\n" % (len(record) + 4, record)
    odd = [member("PaxHeaders.0/1.png", line, type=tarfile.XHDTYPE), member("1.png", b"B")]
    members = [*odd, member("0.png", b"A")] if first else [member("0.png", b"A"), *odd]
    path = write(tmp_path / "a.tar", *members, member("2.png", b"C"))
    read = {data for _, data in found(path)}
    assert {b"A", b"C"} <= read


@pytest.mark.parametrize("kind", [*"LKxg"])
@pytest.mark.parametrize("damage", ["large", "many", "broken", "digits", "records"])
def test_headers_that_want_memory_or_hours_are_one_damaged_place(kind, damage, tmp_path):
    path = write(tmp_path / "a.tar", member("0.png", b"A"), member("2.png", b"C"))
    whole, size = path.read_bytes(), {"large": 1 << 26}.get(damage, 0)
    data = {"broken": b"0 foo=\n", "digits": b"1" * 500_000}.get(damage, b"")
    if damage == "records":
        data = b"".join(b"11 k%04d=v\n" % number for number in range(1000))
    info, _ = member("x", data, type=kind.encode())
    info.size = size or info.size
    odd = info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % 512)
    with path.open("wb") as file:
        file.write(whole[:1024] + odd * (1 if size or damage == "digits" else 300))
        file.truncate(file.tell() + size)
        file.seek(0, io.SEEK_END)
        file.write(whole[1024:])
    start = time.process_time()
    tracemalloc.start()
    assert found(path) == [("0.png", b"A"), ("", None), ("2.png", b"C")]
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()
    assert time.process_time() - start < 4


def test_absolute_names_and_duplicates(tmp_path):
    path = write(
        tmp_path / "a.tar", member("/ant/0.png", png(1)), member("/ant/0.png", png(2)), member("bee/0.png", png(3))
    )
    assert [name for name, _ in found(path)] == ["/ant/0.png", "/ant/0.png", "bee/0.png"]
    data = open_dataset(path)
    assert [(data[index][0].getpixel((0, 0))[0], data[index][1]) for index in range(3)] == [(1, 0), (2, 0), (3, 1)]


def test_other_kinds_of_members_are_told(tmp_path):
    path = write(tmp_path / "a.tar", member("0.png", type=tarfile.FIFOTYPE), member("1.png", type=tarfile.CHRTYPE))
    assert found(path) == [("0.png", None), ("1.png", None)]


def test_hidden_members_are_passed_over(tmp_path):
    path = write(
        tmp_path / "a.tar", member(".cache/0.png", b"A"), member("./a/._1.png", b"B"), member("./a/2.png", b"C")
    )
    assert found(path) == [("./a/2.png", b"C")]


def test_a_data_set_is_whole_or_refused(tmp_path):
    path = write(tmp_path / "a.tar", member("ant/0.png", png(0)), member("bee/0.png", png(1)))
    assert len(open_dataset(path)) == 2
    path.write_bytes(path.read_bytes()[:-2048])
    with pytest.raises(LTMPError, match=r"a\.tar: the \.tar is truncated at byte .*copy or make it again"):
        open_dataset(path)


@settings(max_examples=200)
@given(data=st.data())
def test_any_damage_ends(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    whole = bytearray(write(path, *(member(f"{k}.png", bytes([k]) * 700) for k in range(4))).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        block = 512 * data.draw(st.integers(0, len(whole) // 512 - 1))
        for _ in range(data.draw(st.integers(1, 5))):
            whole[block + data.draw(st.sampled_from(range(512)))] = data.draw(st.integers(0, 255))
        whole[block : block + 512] = resealed(bytes(whole[block : block + 512]))
    path.write_bytes(whole)
    try:
        assert len(found(path)) <= 12
    except tarfile.ReadError:
        assert whole[:512] != bytes(512)
