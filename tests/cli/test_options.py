"""The options of every verb are those of options.txt: `!` is required, `=` a default, `...` may be repeated.

`python -m tests.cli.test_options` writes the file anew.
"""

from __future__ import annotations

import re
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

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


def numbers(kind: type) -> list[tuple[str, str, Any, Any]]:
    """Every option of such numbers: its verb, its name, its annotation, and how it is declared."""
    found = []
    for verb in verbs():
        for name, hint in getattr(import_module(f"ltmp.cli.verbs.{verb}"), f"{verb}_verb").__annotations__.items():
            annotation, declared = get_args(hint)
            if re.search(rf"\b{kind.__name__}\b", str(annotation)) and isinstance(declared, typer.models.OptionInfo):
                found.append((verb, f"--{name.replace('_', '-')}", annotation, declared))
    return found


def test_every_whole_number_has_bounds() -> None:
    found = numbers(int)
    assert len(found) > 60
    assert [(verb, name) for verb, name, _, declared in found if None in (declared.min, declared.max)] == []


def test_no_option_takes_what_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    for verb, name, annotation, _ in numbers(float):
        assert main([verb, name, *["nan"] * max(1, str(annotation).count("float"))]) == 2
        assert name in capsys.readouterr().err, (verb, name)


if __name__ == "__main__":
    FILE.write_text(listing())
