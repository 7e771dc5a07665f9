"""Files appear whole or not at all, and what stops them is said in one sentence."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import contextmanager

import pytest
import torch

import ltmp
from helpers import tiny_vit
from ltmp.errors import LTMPError
from ltmp.files import atomic_path, staged
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


def test_disk_full_is_named(tmp_path):
    with pytest.raises(LTMPError, match="disk is full"), atomic_path(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LTMPError, match="cannot write"), atomic_path(tmp_path / "file" / "more.txt"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LTMPError, match="Permission denied"), atomic_path(tmp_path / "file.txt"):
        pass


def test_thresholds_that_cannot_be_written(tmp_path):
    model = ltmp.attach(tiny_vit())
    with full_disk(), pytest.raises(LTMPError, match="cannot write"):
        ltmp.save(model, tmp_path / "thresholds.safetensors")
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
