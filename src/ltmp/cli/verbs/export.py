"""`ltmp export`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import UsageError
from ...files import check_file_writable
from ...ranges import BATCH, Range
from ..extras import require
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
    """The format and form of the file."""

    format: Annotated[
        str, option("File format: onnx, program (torch.export) or aoti (AOTInductor, compiled for this CPU).")
    ] = "onnx"
    opset: Annotated[int, option("ONNX opset version.", within=Range(min=1, max=100))] = 20
    dense: Annotated[bool, option("Export the dense model instead, for comparison.", None, "--dense")] = False
    static_batch: Annotated[int, option("Batch size of the static form.", within=BATCH)] = 1
    budget: Budget = None
    out: Annotated[
        Path | None,
        option("Output file; default: MODEL_FORM.onnx (or .pt2) in this folder.", check_path=check_file_writable),
    ] = None

    def plan(self) -> Plan:
        """The options as an export plan.

        Raises:
            UsageError: they do not go together.
            MissingExtraError: a package for ONNX is missing.
        """
        from ...export import Plan

        if self.format == "onnx":
            require("onnx", "onnxscript", "onnxruntime")
        return Plan(self.format, self.form, self.opset, self.int8, self.dense, self.static_batch)


@dataclass(frozen=True, kw_only=True)
class ExportData(Source, PreprocessingOptions):
    """Images to verify the file on."""

    data: Annotated[
        str | None, option("Images to verify the file on, as for `ltmp eval`; default: synthetic ones.", DATA)
    ] = None
    images: Annotated[int, option("Number of images to verify the file on.", DATA, within=BATCH)] = 8

    def first_batch(self, network: nn.Module) -> Tensor | None:
        """The first batch of the dataset, without labels; None without --data."""
        if self.data is None:
            return None
        options = DataOptions(data_root=self.data_root, batch_size=self.images, **self.transform)
        split = self.split or "validation"
        for images, _ in options.open(self.data, network, split=split, labelled=False, shuffle=True):
            return images
        raise UsageError(f"{self.data} holds no images that can be read: give others, or no --data")


@verb
def export_verb(model: ReducedModel, options: ExportOptions, data: ExportData, output: OutputOptions) -> None:
    """Export the reduced model for another runtime, after verifying that the file reproduces the model's outputs.

    Example: ltmp export --thresholds runs/deit/thresholds.safetensors --pretrained --form batch --out deit.onnx
    """
    from ... import load
    from ...data.transforms import eval_settings
    from ...evaluate import tables
    from ...export import FORMATS, export
    from ..progress import progress_bar
    from ..screen import print_note, print_result, suggest

    plan, name = options.plan(), model.name(options.budget)
    path = options.out or Path(f"{name}_{plan.form}{'_int8' if plan.int8 else ''}{FORMATS[plan.format]}")
    network = model.build(name, budget=options.budget)
    if options.certified and plan.int8:
        raise UsageError("--certified is for the precision that was certified, which INT8 is not: leave out --int8")
    budget = options.resolve_budget(network, model.thresholds, None, options.budget)
    metadata = load(network, model.thresholds, budget=budget).metadata
    with progress_bar("exporting", 4 if plan.int8 else 3) as bar:
        result = export(
            network,
            path,
            plan,
            images=data.first_batch(network),
            # the budget first: the share of a dial may have been measured at another one
            share=metadata.get("budget", metadata.get("share", metadata.get("target"))),
            metadata={"model": name, "preprocessing": eval_settings(network, data.transform)},
            progress=lambda stage: bar(0, stage) if stage == "tracing" else bar(1, stage),
        )
        bar(1, "done")
    if not output.quiet:
        print_result(
            f"{plan.form} form written to {path}, verified on {result.images} images with {result.counts} different "
            f"token counts (largest difference of a logit {result.difference:.1e}, share {result.share:.3f})"
        )
    if result.note:
        print_note(result.note)
    if plan.format == "onnx" and not plan.dense and not output.quiet:
        runtime = ("--engine", "onnx", "--exported", path)
        suggest("ltmp", "eval", "--data", data.data or "IMAGES", *model.arguments_for(model.thresholds), *runtime)
    if output.json:
        written = {"path": str(path), "format": plan.format, "form": plan.form, "opset": plan.opset, "int8": plan.int8}
        tables.write_json({**written, **result.to_dict()}, output.json)
