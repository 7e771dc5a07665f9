"""Where results go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from .groups import OUTPUT


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Results as JSON."""

    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", help="Write the result as JSON; - is the screen.", rich_help_panel=OUTPUT
        ),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether the screen is taken, so that nothing else is printed there."""
        return self.json == "-"


@dataclass(frozen=True, kw_only=True)
class TableOptions(OutputOptions):
    """Results as JSON and CSV."""

    csv: Annotated[
        str | None,
        typer.Option("--csv", metavar="FILE", help="Write the table as CSV; - is the screen.", rich_help_panel=OUTPUT),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether the screen is taken, so that nothing else is printed there."""
        return "-" in (self.json, self.csv)
