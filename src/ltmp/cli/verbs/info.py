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
        Path | None, typer.Argument(help="A thresholds file, a folder with one, or USER/REPO.")
    ] = None,
) -> None:
    """Show what a thresholds file holds; without one, the versions and devices here."""
    from ...checkpoint import read
    from ...evaluate import describe_machine, tables
    from ..screen import say

    values = _describe_file(read(thresholds)) if thresholds else describe_machine()
    if not output.quiet:
        for name, value in values.items():
            # the sentence beside it says the same
            if name != "certificate":
                say(f"{name}: {value}")
    if output.json:
        tables.write_json(values, output.json)


def _describe_file(file: ThresholdFile) -> dict[str, Any]:
    dial, certificate = file.dial, file.certificate
    certified = {} if certificate is None else {"certified": certificate.sentence()}
    reach = {} if dial is None else {"dial": f"{dial.lowest:g} to {dial.highest:g}, by {len(dial.share)} budgets"}
    return {
        **file.metadata,
        **reach,
        **certified,
        "variant": file.config.variant,
        **({} if file.config.method.fixed else {"scores": str(file.config.scores)}),
        "merge": [round(value, 6) for value in file.merge.tolist()],
        "prune": [round(value, 8) for value in file.prune.tolist()],
    }
