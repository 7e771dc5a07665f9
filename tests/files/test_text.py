"""Text and JSON of others: nothing is waited for, read for ever, or parsed into Python's own complaints."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ltmp.cli.runs import Run
from ltmp.cli.verbs.push import _read
from ltmp.errors import LTMPError
from ltmp.files.text import open_regular, read_json, read_text
from ltmp.report import read_result


def odd(folder: Path, kind: str, name: str = "run.json") -> Path:
    """A file that is no JSON of ours."""
    path = folder / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(3 << 30)
    else:
        path.write_text({"deep": "[" * 100_000, "twice": '{"a": 1, "a": 2}', "nan": '{"settings": NaN}'}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("pipe", "not a regular file"),
        ("device", "not a regular file"),
        ("sparse", "over 67 MB"),
        ("deep", "nested too deep"),
        ("twice", "there twice"),
        ("nan", "NaN is not a number"),
    ],
)
def test_odd_files_are_refused_in_a_sentence(tmp_path: Path, kind: str, why: str) -> None:
    path = odd(tmp_path, kind)
    with pytest.raises(ValueError, match=why):
        read_json(path)
    with pytest.raises(LTMPError, match=rf"run\.json cannot be read as JSON .*{why}"):
        read_result(path)
    with pytest.raises(LTMPError, match=r"run\.json: expected the JSON"):
        _read(path)
    with pytest.raises(LTMPError, match=r"run\.json is damaged: delete it"):
        Run(tmp_path, {}, resume=True)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no such folder here")
def test_a_folder_is_named_and_leaves_no_file_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            open_regular(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfant\r\nbee\rcow\n")
    assert read_text(tmp_path / "a.txt", 20) == "ant\nbee\ncow\n"
    with pytest.raises(ValueError, match="over 0 MB"):
        read_text(tmp_path / "a.txt", 14)
