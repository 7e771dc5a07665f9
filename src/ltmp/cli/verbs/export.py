"""`ltmp export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import UsageError
from ...files import check_file_writable
from ...ranges import BATCH, Range
from ..extras import need
from ..options import (
    DATA,
    Budget,
    CertifiedOption,
    DataOptions,
    FormOptions,
    OutputOptions,
    PreprocessingOptions,
    ReducedModel,
    Source,
    option,
    verb,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...export import Plan


@dataclass(frozen=True, kw_only=True)
class ExportOptions(FormOptions, CertifiedOption):
    """Which file."""

    format: Annotated[str, option("onnx, program (torch.export) or aoti (AOTInductor, compiled for this CPU).")] = (
        "onnx"
    )
    opset: Annotated[int, option("ONNX opset.", within=Range(min=1, max=100))] = 20
    dense: Annotated[bool, option("Export the dense model, to compare with.", None, "--dense")] = False
    static_batch: Annotated[int, option("Images per batch of the static form.", within=BATCH)] = 1
    budget: Budget = None
    out: Annotated[
        Path | None,
        option("The file; default: MODEL_FORM.onnx (or .pt2) in this folder.", writes=check_file_writable),
    ] = None

    def plan(self) -> Plan:
        """The same, checked."""
        from ...export import Plan

        if self.format == "onnx":
            need("onnx", "onnxscript", "onnxruntime")
        return Plan(self.format, self.form, self.opset, self.int8, self.dense, self.static_batch)


@dataclass(frozen=True, kw_only=True)
class ExportData(Source, PreprocessingOptions):
    """Images that the file is verified on."""

    data: Annotated[str | None, option("Images to verify on, as for `ltmp eval`; default: made ones.", DATA)] = None
    images: Annotated[int, option("How many images to verify on.", DATA, within=BATCH)] = 8

    def first(self, network: nn.Module) -> Tensor | None:
        """The first batch of the dataset, if there is one; its labels do not matter."""
        if self.data is None:
            return None
        reading = DataOptions(data_root=self.data_root, batch_size=self.images, **self.transform)
        split = self.split or "validation"
        for images, _ in reading.open(self.data, network, split=split, labelled=False, shuffle=True):
            return images
        raise UsageError(f"{self.data} holds no images that can be read: give others, or no --data")


@verb
def export_verb(model: ReducedModel, options: ExportOptions, data: ExportData, output: OutputOptions) -> None:
    """Write the reduced model for another runtime, after checking that the file gives what the model gives.

    Example: ltmp export --thresholds runs/deit/thresholds.safetensors --pretrained --form batch --out deit.onnx
    """
    from ... import load
    from ...data.transforms import eval_settings
    from ...evaluate import tables
    from ...export import FORMATS, export
    from ..progress import progress_bar
    from ..screen import say, suggest, tell

    plan, name = options.plan(), model.name(options.budget)
    path = options.out or Path(f"{name}_{plan.form}{'_int8' if plan.int8 else ''}{FORMATS[plan.format]}")
    network = model.build(name, budget=options.budget)
    if options.certified and plan.int8:
        raise UsageError("--certified is for the precision that was certified, which INT8 is not: leave out --int8")
    about = load(
        network, model.thresholds, budget=options.share(network, model.thresholds, None, options.budget)
    ).metadata
    with progress_bar("exporting", 4 if plan.int8 else 3) as bar:
        found = export(
            network,
            path,
            plan,
            images=data.first(network),
            # a dial's file was measured at another budget than it may be set to now
            share=about.get("budget", about.get("share", about.get("target"))),
            metadata={"model": name, "preprocessing": eval_settings(network, data.transform)},
            progress=lambda stage: bar(0, stage) if stage == "tracing" else bar(1, stage),
        )
        bar(1, "done")
    if not output.quiet:
        say(
            f"{path}: {plan.form}, verified on {found.images} images with {found.counts} different token counts "
            f"(largest difference of a logit {found.difference:.1e}, share {found.share:.3f})"
        )
    if found.note:
        tell(found.note)
    if plan.format == "onnx" and not plan.dense and not output.quiet:
        where = ("--engine", "onnx", "--exported", path)
        suggest("ltmp", "eval", "--data", data.data or "IMAGES", *model.again(model.thresholds), *where)
    if output.json:
        written = {"path": str(path), "format": plan.format, "form": plan.form, "opset": plan.opset, "int8": plan.int8}
        tables.write_json({**written, **found.to_dict()}, output.json)
