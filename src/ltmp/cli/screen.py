"""The screen: results on stdout, everything else on stderr; text of others is shown, never obeyed."""

from __future__ import annotations

import logging
import shlex

import typer
from rich.console import Console
from rich.text import Text

from ..text import printable

console = Console(stderr=True)


def say(text: object) -> None:
    """A line of results."""
    typer.echo(printable(text))


def tell(text: object) -> None:
    """A line beside the results, which no narrow screen breaks."""
    console.print(Text(printable(text)), soft_wrap=True)


def suggest(*words: object) -> None:
    """The last line of a verb: the command that comes next, as it can be pasted."""
    tell(f"next: {shlex.join(map(str, words))}")


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def tell_log() -> None:
    """Warnings of the package reach the screen, whatever level and handlers libraries give to the root's log."""
    logger = logging.getLogger("ltmp")
    if not logger.handlers:
        logger.addHandler(_Told())
        logger.setLevel(logging.WARNING)
