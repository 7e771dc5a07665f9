"""`ltmp info`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import OutputOptions, verb

if TYPE_CHECKING:
    from ...checkpoint.contents import ThresholdFile


@verb
def info_verb(
    output: OutputOptions,
    thresholds: Annotated[
        Path | None, typer.Argument(help="Thresholds file, a folder with one, or USER/REPO on the Hugging Face Hub.")
    ] = None,
) -> None:
    """Show what a thresholds file holds or, without one, the versions and devices of this machine."""
    from ...checkpoint import read
    from ...evaluate import describe_machine, tables
    from ..screen import print_result

    values = _describe_file(read(thresholds)) if thresholds else describe_machine()
    if not output.quiet:
        for name, value in values.items():
            # "certified" gives the certificate as a sentence
            if name != "certificate":
                print_result(f"{name}: {value}")
    if output.json:
        tables.write_json(values, output.json)


def _describe_file(file: ThresholdFile) -> dict[str, Any]:
    values: dict[str, Any] = dict(file.metadata)
    if file.dial is not None:
        values["dial"] = f"{file.dial.lowest:g} to {file.dial.highest:g}, in {len(file.dial.share)} rows"
    if file.certificate is not None:
        values["certified"] = file.certificate.sentence()
    values["variant"] = file.config.variant
    if not file.config.method.fixed:
        values["scores"] = str(file.config.scores)
    values["merge"] = [round(value, 6) for value in file.merge.tolist()]
    values["prune"] = [round(value, 8) for value in file.prune.tolist()]
    return values
