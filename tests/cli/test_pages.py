"""Commands and code on the pages: verbs and options exist, Python blocks are Python, the first example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ltmp.cli import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    """Page and text of each code block."""
    fence = re.compile(rf"```{language}\n(.*?)```", re.DOTALL)
    return [(page.name, text) for page in PAGES for text in fence.findall(page.read_text())]


def commands() -> dict[str, set[tuple[str, str]]]:
    """For each verb, the options that pages give it, with their page."""
    found: dict[str, set[tuple[str, str]]] = {}
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|-m )ltmp +([a-z]+)([^#]*)", line)
            if match:
                options = re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", match[2])
                found.setdefault(match[1], set()).update((option, page) for option in options)
    return found


@pytest.mark.parametrize("verb", sorted(commands()))
def test_options_on_the_pages_exist(verb: str, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([verb, "--help"]) == 0
    known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
    unknown = sorted((option, page) for option, page in commands()[verb] if option not in known)
    assert not unknown


def test_python_on_the_pages_is_python() -> None:
    found = blocks("python")
    assert len(found) > 20
    for page, text in found:
        compile(text, page, "exec")


def test_the_first_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (text,) = (text for page, text in blocks("python") if page == "README.md" and "import timm" in text)
    # a smaller geometry, so that it takes a second
    for as_written, small in {
        '"deit_tiny_patch16_224"': '"deit_tiny_patch16_224", img_size=64, embed_dim=48, depth=4',
        "224, 224": "64, 64",
    }.items():
        assert as_written in text
        text = text.replace(as_written, small)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "README.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
    assert (tmp_path / "dial.safetensors").is_file()
