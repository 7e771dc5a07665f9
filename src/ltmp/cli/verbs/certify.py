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
    OutputOptions,
    ReducedModel,
    RequiredData,
    RunOptions,
    option,
    verb,
)

if TYPE_CHECKING:
    from torch import nn

    from ...certification import Certificate
    from ...certification.gain import Gain
    from ...data import Loader


@dataclass(frozen=True, kw_only=True)
class CertifyOptions:
    """The risk and its level, and what is tested."""

    risk: Annotated[
        str,
        option(
            "What is bounded: disagree (answers that differ from the dense model's), error (accuracy lost; needs "
            "labels) or embedding (embeddings far from the dense model's, see --distance)."
        ),
    ] = "disagree"
    at_most: Annotated[
        float, option("Bound on the risk: 0.01 is 1 % of images, or 1 point of accuracy.", within=SHARE)
    ] = 0.01
    confidence: Annotated[
        float, option("Confidence of the guarantee, at least 0.5 and below 1.", within=Range(min=0.5, below=1))
    ] = 0.95
    distance: Annotated[
        float,
        option(
            "With --risk embedding: an embedding counts as far if 1 - cosine is above this.", within=Range(min=0, max=2)
        ),
    ] = 0.05
    budget: Annotated[
        list[float] | None,
        option(
            "FLOPs share to test; may be repeated. Default: the range of the dial in steps of 0.05.",
            metavar="SHARE",
            within=BUDGET,
        ),
    ] = None
    limit: Annotated[int | None, option("Use at most this many images, drawn at random.", within=IMAGES)] = None

    def settings(self, run: RunOptions) -> dict[str, Any]:
        """The keyword arguments of `ltmp.certify`."""
        return {
            "risk": self.risk, "at_most": self.at_most, "confidence": self.confidence, "limit": self.distance,
            "images": self.limit, "device": run.torch_device, "amp": run.amp_dtype,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CertifyRun(RunOptions):
    """Device, engine, and whether to time the result."""

    engine: Engine = None
    speed: Annotated[
        bool, option("Also time the certified budget against the dense model and lower resolution.", RUN)
    ] = True


@dataclass(frozen=True, kw_only=True)
class CertifyOutput(OutputOptions):
    """The file for the certificate."""

    out: Annotated[
        Path | None,
        option(
            "Thresholds file to write with the certificate; default: add it to the file of --thresholds.",
            OUTPUT,
            check_path=check_file_writable,
        ),
    ] = None


@verb
def certify_verb(
    data: RequiredData, model: ReducedModel, options: CertifyOptions, run: CertifyRun, output: CertifyOutput
) -> None:
    """Find the smallest budget that provably answers like the dense model, tested on images not used for learning.

    The certificate is stored in the thresholds file, and --certified sets its budget in every other command. The exit
    code is 1 if no budget can be certified.

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
    _report(certificate, gain, path, output)
    if certificate.budget is None:
        raise typer.Exit(1)
    if not output.quiet:
        suggest("ltmp", "serve", *model.arguments_for(path), "--certified")


def certified_with_bar(
    network: nn.Module, loader: Loader, options: CertifyOptions, run: RunOptions, *, speed: bool
) -> tuple[Certificate, Gain | None]:
    """Certify with a progress bar and, with `speed`, time the result on this machine."""
    from ...certification import certify
    from ...certification.gain import measure_gain
    from ..progress import progress_bar

    settings = options.settings(run)
    with progress_bar("certifying", loader.images) as bar:
        certificate = certify(network, loader, budgets=options.budget, progress=bar.reach, **settings)
    if not speed:
        return certificate, None
    shared = {name: settings[name] for name in ("limit", "images", "amp")}
    with progress_bar("certifying lower resolution", loader.images) as bar:
        return certificate, measure_gain(network, loader, certificate, progress=bar.reach, **shared)


def _report(certificate: Certificate, gain: Gain | None, path: Path, output: OutputOptions) -> None:
    """Print the tested budgets as a table and the result as a paragraph, and write both as JSON."""
    from ...evaluate import tables
    from ..screen import print_result

    if not output.quiet:
        rows = [
            {"budget": f"{one.budget:g}", "risk %": 100 * one.risk, "at most %": 100 * one.upper, "images": one.images,
             "p": one.p}
            for one in certificate.tested
        ]  # fmt: skip
        tables.show(rows, f"{path}: budgets tested, from the largest down")
        print_result(paragraph(certificate, gain))
    if output.json:
        tables.write_json({"thresholds": str(path), **as_json(certificate, gain)}, output.json)


def as_json(certificate: Certificate, gain: Gain | None) -> dict[str, Any]:
    """The certificate, the speeds and the paragraph as plain values."""
    speeds = None if gain is None else asdict(gain)
    return {"certificate": certificate.to_dict(), "gain": speeds, "paragraph": paragraph(certificate, gain)}


def paragraph(certificate: Certificate, gain: Gain | None) -> str:
    """The result in two sentences: the guarantee, and the speed if it was measured."""
    guarantee = certificate.sentence()
    return f"{guarantee[0].upper()}{guarantee[1:]}.{'' if gain is None else f' {gain.sentence()}'}"
