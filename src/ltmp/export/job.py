"""Export an attached model to a verified file, and run exported files as a model that `evaluate` accepts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._version import __version__
from ..data.transforms import eval_settings
from ..errors import LTMPError, UsageError
from ..files import staged
from ..hosts.attach import attachment
from .onnx import OPSET, check_opset, read_metadata, write_onnx
from .program import check, check_form, learned_thresholds, trace, write_package, write_program
from .quantize import quantize
from .runtimes import OPENERS, ExportedModel, Session, open_onnx, open_package, open_program
from .verify import Verification, check_share, expect, synthetic_images, verify, verify_quantised

FORMATS = {"onnx": ".onnx", "program": ".pt2", "aoti": ".pt2"}
"""Formats and their file name extensions."""

IMAGES = 8
"""How many images an export is verified on if the caller gives none."""


@dataclass(frozen=True)
class Plan:
    """Settings of an export.

    Args:
        format: `onnx`, `program` (`torch.export`) or `aoti` (AOTInductor, compiled for this machine's CPU).
        form: `single`, `batch` or `static`, see `trace`.
        opset: ONNX opset.
        int8: quantise linear layers; ONNX only.
        dense: export the model as if nothing were attached.
        batch_size: number of images of the static form.

    Raises:
        UsageError: a setting is unknown, out of range, or cannot be combined with another.
    """

    format: str = "onnx"
    form: str = "batch"
    opset: int = OPSET
    int8: bool = False
    dense: bool = False
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"unknown format {self.format!r}: expected one of {', '.join(FORMATS)}")
        check_opset(self.opset)
        check_form(self.form, self.batch_size)
        if self.int8 and self.format != "onnx":
            raise UsageError(f"int8 is ONNX Runtime's quantisation: it goes with format onnx, not {self.format}")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    plan: Plan | None = None,
    *,
    images: Tensor | None = None,
    share: float | None = None,
    metadata: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Verification:
    """Write an attached model to `path`, after verifying that the file reproduces the model's outputs.

    Args:
        model: attached, float32, on the CPU; left unchanged.
        path: ending in `.onnx`, or in `.pt2` for the formats of torch. Replaced only if the export succeeds.
        images: [B, C, H, W] to verify on; None generates images with about the FLOPs share `share`.
        share: mean FLOPs share of the thresholds, stored in the file. None is the budget that their dial is set to or,
            without one, the mean share of `images`.
        metadata: further metadata for the file, JSON types.
        progress: called before each stage with its name.

    Raises:
        UsageError: `path` does not have the extension of the format.
        LTMPError: the model cannot be exported, or the export differs from it; `path` is left untouched.
        MissingExtraError: a package that this format needs is not installed.
    """
    plan = plan or Plan()
    path = Path(path)
    if path.suffix != FORMATS[plan.format]:
        raise UsageError(f"{path.name} has the wrong ending for format {plan.format}: expected {FORMATS[plan.format]}")
    check(model)
    if plan.dense:
        share = 1.0
    elif share is None:
        share = learned_thresholds(model).budget
    synthetic = images is None
    images = synthetic_images(model, IMAGES, share) if images is None else images
    expected = expect(model, images, dense=plan.dense)
    facts = {**describe_export(model, plan), **(metadata or {})}
    if share is not None or not synthetic:
        facts = {"share": expected.share.mean().item() if share is None else share, **facts}
    text = {f"ltmp.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    with staged(path) as temporary:
        progress("tracing")
        program = trace(
            model,
            plan.form,
            shape=tuple(images.shape[1:]),
            dense=plan.dense,
            batch_size=plan.batch_size,
            compiled=plan.format == "aoti",
        )
        progress("writing")
        if plan.format == "onnx":
            write_onnx(program, temporary, text, opset=plan.opset)
        else:
            (write_program if plan.format == "program" else write_package)(program, temporary, text)
        progress("verifying")
        verification = verify(_open(temporary, plan, images), expected)
        if plan.int8:
            progress("quantising")
            quantize(temporary, temporary)
            verification = verify_quantised(open_onnx(temporary), expected)
    return check_share(verification, share, synthetic)


def describe_export(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Metadata for an exported file."""
    facts = {
        "version": __version__,
        "model": attachment(model).describe().get("architecture", type(model).__name__),
        "form": plan.form,
        "batch_size": plan.batch_size,
        "precision": "int8" if plan.int8 else "float32",
        "reduced": not plan.dense,
    }
    # only timm keeps its preprocessing on the model
    return {**facts, "preprocessing": eval_settings(model)} if hasattr(model, "pretrained_cfg") else facts


def _open(path: Path, plan: Plan, images: Tensor) -> Session:
    """Open a file that was exported with `plan` for `images`."""
    if plan.format == "aoti":
        fixed = {"single": 1, "static": plan.batch_size}.get(plan.form)
        return open_package(path, fixed, tuple(images.shape[1:]))
    return open_onnx(path) if plan.format == "onnx" else open_program(path)


def in_runtime(
    model: nn.Module,
    engine: str,
    exported: str | os.PathLike[str] | None = None,
    plan: Plan | None = None,
    *,
    threads: int | None = None,
    images: Tensor | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> ExportedModel:
    """Run an attached model in another runtime: its reduced export, and its dense export for comparison.

    Args:
        engine: `onnx` (ONNX Runtime) or `openvino`.
        exported: file of the reduced model; None exports it to a temporary file. The dense model is always exported to
            a temporary file.
        plan: how to export; with `exported`, the settings are read from that file.
        threads: number of threads of the runtime; None is as many as torch uses.
        images: [B, C, H, W] to verify on, as for `export`.
        progress: called before each stage with its name.

    Raises:
        UsageError: the engine is unknown.
        LTMPError: `exported` was not written by `export`, or from another model; or an export fails.
    """
    if engine not in OPENERS:
        raise UsageError(f"unknown runtime {engine!r}: expected one of {', '.join(OPENERS)}")
    plan = plan or Plan()
    with tempfile.TemporaryDirectory(prefix="ltmp-") as folder:
        if exported is None:
            exported = Path(folder) / "reduced.onnx"
            export(model, exported, plan, images=images, progress=progress)
        else:
            plan = plan_of(exported)
        dense = Path(folder) / "dense.onnx"
        export(model, dense, replace(plan, dense=True), images=images, progress=progress)
        sessions = [OPENERS[engine](file, threads) for file in (exported, dense)]
    return ExportedModel(model, *sessions)


def plan_of(path: str | os.PathLike[str]) -> Plan:
    """The plan that an ONNX file was exported with, read from its metadata.

    Raises:
        LTMPError: `export` did not write this file.
    """
    metadata = read_metadata(path)
    try:
        return Plan(
            form=metadata["ltmp.form"],
            int8=metadata["ltmp.precision"] == "int8",
            batch_size=int(metadata["ltmp.batch_size"]),
        )
    except KeyError as error:
        raise LTMPError(f"{path} does not say how it was exported: give a file that `ltmp export` wrote") from error
