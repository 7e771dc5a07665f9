"""Files appear whole or not at all, and what stops them is said in one sentence."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import ltmp
from helpers import tiny_vit
from ltmp.errors import LTMPError
from ltmp.files import atomic_path, check_file_writable, check_writable, staged
from ltmp.learning.resume import save_run


@contextmanager
def full_disk(room: int = 64):
    """Writing past `room` bytes of a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_file_appears_only_when_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert os.listdir(path.parent) == ["file.txt"]


def test_failure_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("write", [atomic_path, staged])
def test_disk_full_is_named_and_no_folder_stays(tmp_path, write):
    with pytest.raises(LTMPError, match="disk is full"), write(tmp_path / "new" / "deep" / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_folders_of_others_stay(tmp_path):
    folder = tmp_path / "there" / "new"

    def fail():
        with atomic_path(folder / "file.txt"):
            (folder / "another.txt").write_text("meanwhile")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(LTMPError, match="disk is full"):
        fail()
    assert os.listdir(folder) == ["another.txt"]


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LTMPError, match="cannot write"), atomic_path(tmp_path / "file" / "more.txt"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LTMPError, match="Permission denied"), atomic_path(tmp_path / "file.txt"):
        pass


@pytest.mark.parametrize(
    "write",
    [
        lambda model, folder: ltmp.save(model, folder / "thresholds.safetensors"),
        lambda model, folder: ltmp.pack(model, folder / "bundle", model_name="vit_tiny_patch16_224"),
    ],
    ids=["thresholds", "bundle"],
)
def test_tensors_that_cannot_be_written(tmp_path, write):
    """What the system said, and not how a library repeats it."""
    model = ltmp.attach(tiny_vit())
    with full_disk(), pytest.raises(LTMPError, match=r"cannot write .*: File too large; choose a folder"):
        write(model, tmp_path)
    assert os.listdir(tmp_path) == []


def test_run_that_cannot_be_written(tmp_path):
    with full_disk(), pytest.raises(LTMPError, match="cannot write"):
        save_run(tmp_path / "run.pt", {}, {"latent": torch.zeros(1000)})
    assert os.listdir(tmp_path) == []


def test_files_of_one_result_appear_together(tmp_path):
    path = tmp_path / "new" / "model.onnx"
    with staged(path) as temporary:
        assert temporary.name == "model.onnx"
        temporary.write_text("graph")
        temporary.with_name("model.onnx.data").write_text("weights")
        assert os.listdir(path.parent) == [temporary.parent.name]
    assert sorted(os.listdir(path.parent)) == ["model.onnx", "model.onnx.data"]


def test_failure_leaves_nothing_of_several_files(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), staged(path) as temporary:
        temporary.write_text("half" + "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_device_is_written_into_and_stays_one(tmp_path):
    for path in (Path(os.devnull), tmp_path / "link"):
        if path.name == "link":
            path.symlink_to(os.devnull)
        with atomic_path(path) as temporary:
            temporary.write_text("into nothing")
        assert stat.S_ISCHR(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["link"]
    assert not [name for name in os.listdir(Path(os.devnull).parent) if "ltmp-tmp" in name]


def test_a_pipe_gets_the_whole_content(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    with atomic_path(pipe) as temporary:
        temporary.write_text("one")
        # writers may open it again
        temporary.write_text("whole")
    reader.join(10)
    assert found == [b"whole"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_failure_writes_nothing_into_a_device(tmp_path):
    with pytest.raises(ZeroDivisionError), atomic_path(os.devnull):
        raise ZeroDivisionError
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file.txt").write_text("old")
    for name in ("file.txt", "new.txt"):
        link = tmp_path / name
        link.symlink_to(tmp_path / "there" / name)
        with atomic_path(link) as temporary:
            temporary.write_text("whole")
        assert link.is_symlink()
        assert (tmp_path / "there" / name).read_text() == "whole"


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_mode_of_any_other_and_the_umask_is_left_alone(tmp_path, monkeypatch, mask):
    before = os.umask(mask)
    try:
        monkeypatch.setattr(os, "umask", None)
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("whole")
            assert stat.S_IMODE(temporary.stat().st_mode) == 0o666 & ~mask
        with staged(tmp_path / "model.onnx") as temporary:
            temporary.write_text("graph")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o666 & ~mask}


def test_long_names_can_be_saved(tmp_path):
    with atomic_path(tmp_path / ("n" * 250)) as temporary:
        temporary.write_text("whole")
    with pytest.raises(LTMPError, match="File name too long"), atomic_path(tmp_path / ("n" * 300)):
        pass
    assert os.listdir(tmp_path) == ["n" * 250]


KILLED = """
import os, signal, sys
from ltmp.files import atomic_path, check_file_writable, check_writable, staged
with atomic_path(sys.argv[1] + "/t.safetensors") as file, staged(sys.argv[1] + "/m.onnx") as other:
    file.write_text("half")
    other.write_text("half")
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if sys.argv[2] == "dies" else sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["dies", "lives"])
def test_what_killed_saves_left_is_swept_and_nothing_else(tmp_path, state):
    others = [".file.txt.swp", ".mine.ltmp-tmp", "file.0123abcd.ltmp-tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    (tmp_path / ".link.0123abcd.ltmp-tmp").symlink_to(tmp_path / others[0])
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path), state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        if state == "dies":
            assert process.wait(30) == -signal.SIGKILL
        begun = len(os.listdir(tmp_path))
        with atomic_path(tmp_path / "file.txt") as temporary:
            temporary.write_text("whole")
        assert len(os.listdir(tmp_path)) == begun + 1 - (2 if state == "dies" else 0)
    finally:
        process.communicate()
    assert sorted(os.listdir(tmp_path)) == sorted(
        [*others, ".link.0123abcd.ltmp-tmp", "file.txt", *(["t.safetensors", "m.onnx"] if state == "lives" else [])]
    )


def test_files_of_safetensors_have_the_mode_of_any_other(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "weights.safetensors") as temporary:
            save_file({"w": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert (tmp_path / "weights.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_is_no_folder_gets_no_files(tmp_path):
    with open(tmp_path / "gone", "w") as stream:
        os.unlink(tmp_path / "gone")
        folder = Path(f"/proc/self/fd/{stream.fileno()}")
        with pytest.raises(LTMPError, match="cannot write"):
            check_writable(folder)
        with pytest.raises(LTMPError, match="cannot write"), atomic_path(folder / "file.txt"):
            pass
        with atomic_path(folder) as temporary:
            temporary.write_text("in the file that has no name")
        assert os.fstat(stream.fileno()).st_size > 0
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "there/file.txt", "n" * 300], ids=["a folder", "below a file", "too long"])
def test_a_file_that_cannot_be_written_is_found_out_first(tmp_path, name):
    (tmp_path / "there").write_text("")
    with pytest.raises(LTMPError, match="cannot write"):
        check_file_writable(tmp_path / name)
    check_file_writable(tmp_path / "new" / "file.txt")
    assert os.listdir(tmp_path) == ["there"]
