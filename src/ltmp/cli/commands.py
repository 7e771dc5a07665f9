"""The verbs, each imported when it is asked for."""

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
    "Look": ("demo", "show", "app", "info"),
    "Deploy": ("pack", "export", "serve", "predict", "push"),
}
VERBS = {verb: panel for panel, verbs in PANELS.items() for verb in verbs}
_STYLE: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False, "rich_markup_mode": "rich"}
_STYLE["context_settings"] = {"help_option_names": ["-h", "--help"]}


class _Plain:
    """Help that says of no switch that it is a <bool>."""

    def get_params(self, ctx: Any) -> list[Any]:
        found: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class Verb(_Plain, TyperCommand):
    """A verb."""


class Verbs(_Plain, TyperGroup):
    """Finds verbs by name in `ltmp.cli.verbs`, whose modules import torch only when they run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        # for suggestions; the commands themselves are made by `get_command`
        self.commands = dict.fromkeys(VERBS)  # type: ignore[assignment]

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        module = import_module(f".verbs.{cmd_name}", __package__)
        single = typer.Typer(**_STYLE)
        single.command(cmd_name, cls=Verb, rich_help_panel=VERBS[cmd_name])(getattr(module, f"{cmd_name}_verb"))
        return typer.main.get_command(single)


app = typer.Typer(
    cls=Verbs,
    help="Learned Thresholds token Merging and Pruning: make a vision transformer cheaper, image by image.",
    epilog="Start with: ltmp demo",
    no_args_is_help=True,
    **_STYLE,
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(f"ltmp {__version__}")
        raise typer.Exit
    from .screen import tell_log

    tell_log()


def call(arguments: Sequence[str]) -> int:
    """Run a verb and return its exit code; errors are passed on, Typer's about options, too."""
    try:
        code = int(app(list(arguments), prog_name="ltmp", standalone_mode=False) or 0)
    except typer.Abort:
        code = INTERRUPTED
    # Typer makes an exit code of Ctrl-C, too
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    return code
