"""What is on the screen: bars when there is something to show, lines in logs, and text of others as text."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from ltmp.cli import main, progress, screen
from ltmp.cli.progress import progress_bar
from ltmp.errors import UsageError


@pytest.fixture(params=[True, False], ids=["terminal", "log"])
def seen(request, monkeypatch) -> io.StringIO:
    """What goes to stderr."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=request.param, width=100, color_system=None)
    monkeypatch.setattr(screen, "console", console)
    monkeypatch.setattr(progress, "console", console)
    return file


def test_nothing_is_drawn_before_there_is_something_to_show(seen):
    with pytest.raises(UsageError), progress_bar("learning", None):
        raise UsageError("a mistake")
    assert seen.getvalue() == ""


def test_text_of_others_is_shown_and_not_obeyed(seen):
    with progress_bar("reading o[/red]\x1b[31m", 10) as bar:
        bar(10)
    screen.print_note("o[/red]\x1b[31m")
    assert seen.getvalue().count(r"o[/red]\x1b[31m") >= 2


def test_warnings_are_seen_whatever_the_roots_log_is_set_to(seen, tmp_path):
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        assert main(["info", str(tmp_path / "none.safetensors")]) == 2
        logging.getLogger("ltmp.any").warning("lost \x1b[31m")
        # a second verb of the same process says it once, too
        assert main(["info", str(tmp_path / "none.safetensors")]) == 2
        logging.getLogger("ltmp").warning("once")
    finally:
        root.setLevel(level)
    assert seen.getvalue().splitlines() == ["lost \\x1b[31m", "once"]


def test_steps_of_many_seconds_have_a_remaining_time(monkeypatch):
    file, clock = io.StringIO(), iter(float(40 * i) for i in range(1000))
    console = Console(file=file, force_terminal=True, width=120, color_system=None, get_time=lambda: next(clock))
    monkeypatch.setattr(progress, "console", console)
    with progress_bar("learning", 20) as bar:
        for _ in range(6):
            bar()
        (task,) = bar._drawn.tasks
        assert task.time_remaining is not None


def test_a_log_has_a_line_for_every_tenth_and_no_bar(monkeypatch):
    file = io.StringIO()
    console = Console(file=file, force_terminal=False, width=20)
    monkeypatch.setattr(screen, "console", console)
    monkeypatch.setattr(progress, "console", console)
    with progress_bar("a long text that no narrow file may break", 100) as bar:
        for _ in range(100):
            bar()
    lines = file.getvalue().splitlines()
    assert lines == [f"a long text that no narrow file may break ({k} of 100)" for k in range(10, 101, 10)]


def test_errors_are_one_line_without_escapes(capsys):
    assert main(["info", "gone\x1b[31m\n[/red].safetensors"]) != 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert r"gone\x1b[31m [/red].safetensors" in said
