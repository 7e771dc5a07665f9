"""The options of every verb are those of options.txt: `!` is required, `=` a default, `...` may be repeated.

`python -m tests.cli.test_options` writes the file anew.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
import typer

from ltmp.cli import main
from ltmp.cli.commands import app
from ltmp.cli.verbs.learn import TuningOptions
from ltmp.cli.verbs.show import Pictures
from ltmp.learning import Tuning
from ltmp.visualize.showing import FORMATS

FILE = Path(__file__).with_name("options.txt")


def verbs() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {name: group.get_command(None, name) for name in group.list_commands(None)}


def described(parameter: Any) -> str:
    """`--batch-size=64`, `--data!`, `--model-kwargs NAME=VALUE...`."""
    option = parameter.param_type_name == "option"
    name = "/".join((*parameter.opts, *parameter.secondary_opts)) if option else parameter.name.upper()
    metavar = f" {parameter.metavar}" if option and parameter.metavar else ""
    default = (
        "!"
        if parameter.required
        else ""
        if parameter.default is None or parameter.default is False
        else f"={parameter.default}"
    )
    repeated = getattr(parameter, "multiple", False) or parameter.nargs == -1
    return f"{name}{metavar}{default}{'...' if repeated else ''}"


def listing() -> str:
    paragraphs = []
    for name, verb in verbs().items():
        words = " ".join(sorted(described(parameter).replace(" ", "\0") for parameter in verb.params))
        wrapped = textwrap.wrap(f"{name}: {words}", 120, subsequent_indent="    ", break_on_hyphens=False)
        paragraphs.append("\n".join(wrapped).replace("\0", " "))
    return "\n\n".join(paragraphs) + "\n"


def test_options_are_as_listed() -> None:
    assert listing() == FILE.read_text()


def test_every_verb_can_show_tracebacks() -> None:
    assert all("--debug" in [o for p in verb.params for o in p.opts] for verb in verbs().values())


def test_what_options_repeat_of_the_library() -> None:
    """Options know defaults and choices that the library has, too, but whose modules import torch."""
    assert TuningOptions(tune="norms").tuning() == Tuning("norms")
    hint = Pictures.__annotations__["formats"]
    assert "|".join(FORMATS) in str(hint)


def numbers() -> list[tuple[str, str, Any]]:
    """Every option of numbers: its verb, its name, and the type of one."""
    found = []
    for name, verb in verbs().items():
        for parameter in verb.params:
            kind = getattr(parameter.type, "types", [parameter.type])[0]
            if kind.name.split()[0] in ("integer", "float"):
                found.append((name, parameter.opts[0], kind))
    return found


def test_every_whole_number_has_bounds() -> None:
    bounds = {(verb, name): (getattr(kind, "min", None), getattr(kind, "max", None))
              for verb, name, kind in numbers() if kind.name.startswith("integer")}  # fmt: skip
    assert len(bounds) > 60
    assert [name for name, ends in bounds.items() if None in ends] == []


def test_no_option_takes_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, name, kind in numbers():
        if kind.name.startswith("float"):
            values = ["nan"] * (3 if name in ("--mean", "--std") else 1)
            assert main([verb, name, *values]) == 2
            assert f"{name} is nan: expected" in capsys.readouterr().err, (verb, name)


if __name__ == "__main__":
    FILE.write_text(listing())
