"""Options for where results are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...files import check_file_writable, check_writable, is_stdout
from .groups import OUTPUT, option


def _check_result_path(path: str) -> None:
    """Refuse a file that cannot be written; stdout always can be."""
    if not is_stdout(path):
        check_file_writable(path)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Results as JSON."""

    json: Annotated[
        str | None,
        option(
            "Write the results as JSON to this file; - for stdout.",
            OUTPUT,
            "--json",
            metavar="FILE",
            check_path=_check_result_path,
        ),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether stdout is reserved for a file format, so that nothing else may be printed there."""
        return self.json is not None and is_stdout(self.json)


@dataclass(frozen=True, kw_only=True)
class TableOptions(OutputOptions):
    """Results as JSON and CSV."""

    csv: Annotated[
        str | None,
        option(
            "Write the table as CSV to this file; - for stdout.",
            OUTPUT,
            "--csv",
            metavar="FILE",
            check_path=_check_result_path,
        ),
    ] = None

    @property
    def quiet(self) -> bool:
        """Whether stdout is reserved for a file format, so that nothing else may be printed there."""
        return any(path is not None and is_stdout(path) for path in (self.json, self.csv))


@dataclass(frozen=True, kw_only=True)
class FolderOptions(OutputOptions):
    """The folder of a run."""

    out: Annotated[
        Path | None,
        option(
            "Output folder; default: a folder in runs/ named after model, variant and budget.",
            OUTPUT,
            check_path=check_writable,
        ),
    ] = None

    def folder(self, model: str, *parts: str) -> Path:
        """The output folder; by default in `runs/`, named after the model and further parts."""
        return self.out or Path("runs") / "-".join((short_name(model), *parts))


def short_name(model: str) -> str:
    """The last part of a model name, for folders: `hf:google/vit-base` is `vit-base`."""
    return Path(model.rpartition(":")[2]).name
