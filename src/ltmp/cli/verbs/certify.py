"""`ltmp certify`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError
from ...files import check_file_writable
from ...ranges import BUDGET, IMAGES, SHARE, Range
from ..options import (
    OUTPUT,
    RUN,
    Engine,
    GivenData,
    OutputOptions,
    ReducedModel,
    RunOptions,
    option,
    verb,
)

if TYPE_CHECKING:
    from torch import nn

    from ...certification import Certificate
    from ...certification.gain import Gain
    from ...data import Loader

RISKS = "disagree (another first choice than the dense model's), error (accuracy lost, needs labels) or embedding"


@dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """Options for the guarantee."""

    risk: Annotated[str, option(f"{RISKS}.")] = "disagree"
    at_most: Annotated[float, option("The level: 0.01 is 1 % of images, or 1 point of accuracy.", within=SHARE)] = 0.01
    confidence: Annotated[float, option("How sure, from 0.5 to below 1.", within=Range(min=0.5, below=1))] = 0.95
    distance: Annotated[
        float, option("Of --risk embedding: 1 - cosine above which an embedding counts.", within=Range(min=0, max=2))
    ] = 0.05
    budget: Annotated[
        list[float] | None,
        option(
            "FLOPs share to test; may be repeated. Default: every 0.05 on the dial.", metavar="SHARE", within=BUDGET
        ),
    ] = None
    limit: Annotated[int | None, option("Use at most this many images, drawn at random.", within=IMAGES)] = None

    def settings(self, run: RunOptions) -> dict[str, Any]:
        """The arguments of `ltmp.certify`."""
        return {
            "risk": self.risk, "at_most": self.at_most, "confidence": self.confidence, "limit": self.distance,
            "images": self.limit, "device": run.place, "amp": run.cast,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CertifyRun(RunOptions):
    """Where, by what, and what else is measured."""

    engine: Engine = None
    speed: Annotated[bool, option("Time the result against dense and against lower resolution, too.", RUN)] = True


@dataclass(frozen=True, kw_only=True)
class CertifyOutput(OutputOptions):
    """Where the certificate goes."""

    out: Annotated[
        Path | None,
        option("Thresholds file with the certificate; default: the one given.", OUTPUT, writes=check_file_writable),
    ] = None


@verb
def certify_verb(
    data: GivenData, model: ReducedModel, options: CertifyOptions, run: CertifyRun, output: CertifyOutput
) -> None:
    """Find the smallest budget that provably answers like the dense model, on images that nothing was learned from.

    The certificate is kept in the thresholds file; --certified then sets its budget in every verb. The exit code is 1
    where no budget is certified.

    Example: ltmp certify --data val/ --thresholds runs/dial --pretrained --at-most 0.01
    """
    from ... import load
    from ...checkpoint import annotate
    from ...locate import locate
    from ..runs import report_skipped
    from ..screen import suggest

    name = model.name()
    if output.out is None and not model.thresholds.exists():
        raise UsageError(f"where to? {model.thresholds} is not a file here: give --out FILE.safetensors")
    path = output.out or locate(model.thresholds)
    check_file_writable(path)
    network = model.build(name)
    load(network, model.thresholds, engine=run.engine)
    labelled = options.risk == "error"
    loader = data.open(
        data.data, network, split=data.split or "validation", labelled=labelled, limit=options.limit, evenly=False
    )
    certificate, gain = certified_with_bar(network, loader, options, run, speed=run.speed)
    report_skipped(loader.skipped)
    annotate(locate(model.thresholds), path, certificate=certificate.to_dict())
    show_certificate(certificate, gain, path, output)
    if certificate.budget is None:
        raise typer.Exit(1)
    if not output.quiet:
        suggest("ltmp", "serve", *model.again(path), "--certified")


def certified_with_bar(
    network: nn.Module, loader: Loader, options: CertifyOptions, run: RunOptions, *, speed: bool
) -> tuple[Certificate, Gain | None]:
    """`certify` and what it brings here, with a progress bar."""
    from ...certification import certify
    from ...certification.gain import measure_gain
    from ..progress import progress_bar

    how = options.settings(run)
    with progress_bar("certifying", loader.images) as bar:
        certificate = certify(network, loader, budgets=options.budget, progress=bar.reach, **how)
    if not speed:
        return certificate, None
    kept = {name: how[name] for name in ("limit", "images", "amp")}
    with progress_bar("certifying lower resolution", loader.images) as bar:
        return certificate, measure_gain(network, loader, certificate, progress=bar.reach, **kept)


def show_certificate(certificate: Certificate, gain: Gain | None, path: Path, output: OutputOptions) -> None:
    """The budgets as a table, and the result in a paragraph; or all as JSON."""
    from ...evaluate import tables
    from ..screen import say

    if not output.quiet:
        rows = [
            {"budget": f"{one.budget:g}", "risk %": 100 * one.risk, "at most %": 100 * one.upper, "images": one.images,
             "p": one.p}
            for one in certificate.tested
        ]  # fmt: skip
        tables.show(rows, f"tested from the mildest down, in {path}")
        say(paragraph(certificate, gain))
    if output.json:
        tables.write_json({"thresholds": str(path), **as_json(certificate, gain)}, output.json)


def as_json(certificate: Certificate, gain: Gain | None) -> dict[str, Any]:
    """Certificate, speeds and the paragraph."""
    speeds = None if gain is None else asdict(gain)
    return {"certificate": certificate.to_dict(), "gain": speeds, "paragraph": paragraph(certificate, gain)}


def paragraph(certificate: Certificate, gain: Gain | None) -> str:
    """The result for whoever has to decide."""
    told = certificate.sentence()
    return f"{told[0].upper()}{told[1:]}.{'' if gain is None else f' {gain.sentence()}'}"
