"""The Typer application; each verb's module is imported only when the verb is called."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .. import __version__
from ..errors import INTERRUPTED

PANELS = {
    "Learn": ("learn", "dial"),
    "Measure": ("eval", "certify", "bench", "compare", "reproduce", "report"),
    "Explore": ("demo", "show", "app", "info"),
    "Deploy": ("pack", "export", "serve", "predict", "push"),
}
VERBS = {verb: panel for panel, verbs in PANELS.items() for verb in verbs}
_STYLE: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
_STYLE["context_settings"] = {"help_option_names": ["-h", "--help"]}


class _PlainFlags:
    """A command whose help does not show "<bool>" beside flags."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters


class VerbCommand(_PlainFlags, TyperCommand):
    """A verb."""


class VerbGroup(_PlainFlags, TyperGroup):
    """Finds verbs by name in `ltmp.cli.verbs`, whose modules import torch only when they run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # only the names matter, for "did you mean" suggestions; `get_command` makes the commands
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = import_module(f".verbs.{cmd_name}", __package__)
        single = typer.Typer(**_STYLE)
        function = getattr(module, f"{cmd_name}_verb")
        single.command(cmd_name, cls=VerbCommand, rich_help_panel=VERBS[cmd_name])(function)
        return typer.main.get_command(single)


app = typer.Typer(
    cls=VerbGroup,
    help="Learned Thresholds token Merging and Pruning: make a vision transformer cheaper, image by image.",
    epilog="Start with: ltmp demo. `ltmp COMMAND --help` explains the options of a command.",
    no_args_is_help=True,
    **_STYLE,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"ltmp {__version__}")
        raise typer.Exit
    from .screen import show_warnings

    show_warnings()


def call(arguments: Sequence[str]) -> int:
    """Run a verb and return its exit code. Errors propagate, including Typer's usage errors."""
    try:
        code = int(app(list(arguments), prog_name="ltmp", standalone_mode=False) or 0)
    except typer.Abort:
        code = INTERRUPTED
    # Typer turns Ctrl-C into `Abort` or into this exit code
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code
