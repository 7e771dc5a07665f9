"""Where results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...files import check_file_writable, check_writable, is_stdout
from .groups import OUTPUT, option


def _check_result(path: str) -> None:
    """Refuse a file that cannot be written; the screen always can be."""
    if not is_stdout(path):
        check_file_writable(path)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Results as JSON."""

    json: Annotated[
        str | None,
        option("Write the result as JSON; - is the screen.", OUTPUT, "--json", metavar="FILE", writes=_check_result),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether the screen is taken, so that nothing else is printed there."""
        return self.json is not None and is_stdout(self.json)


@dataclass(frozen=True, kw_only=True)
class TableOptions(OutputOptions):
    """Results as JSON and CSV."""

    csv: Annotated[
        str | None,
        option("Write the table as CSV; - is the screen.", OUTPUT, "--csv", metavar="FILE", writes=_check_result),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether the screen is taken, so that nothing else is printed there."""
        return any(path is not None and is_stdout(path) for path in (self.json, self.csv))


@dataclass(frozen=True, kw_only=True)
class FolderOptions(OutputOptions):
    """A run's folder."""

    out: Annotated[
        Path | None,
        option(
            "Output folder; default: in runs/, named after model, variant and budget.", OUTPUT, writes=check_writable
        ),
    ] = None

    def folder(self, model: str, *rest: str) -> Path:
        """Where a run goes."""
        return self.out or Path("runs") / "-".join((short_name(model), *rest))


def short_name(model: str) -> str:
    """The last part of a model's name, for folders: those of hubs have more."""
    return Path(model.rpartition(":")[2]).name
