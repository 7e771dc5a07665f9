"""One call from an attached model to a verified file, and from there to something that `evaluate` takes."""

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
from .verify import Verification, check_share, expect, made_images, verify, verify_quantised

FORMATS = {"onnx": ".onnx", "program": ".pt2", "aoti": ".pt2"}
"""What is written, and how such a file is called."""

IMAGES = 8
"""How many images an export is verified on where none are given."""


@dataclass(frozen=True)
class Plan:
    """Settings of an export.

    Args:
        format: `onnx`, `program` (`torch.export`) or `aoti` (AOTInductor, compiled for this machine's CPU).
        form: `single`, `batch` or `static`, see `trace`.
        opset: of ONNX.
        int8: quantise linear layers, ONNX only.
        dense: the model as if nothing were attached.
        batch_size: images of the static form.

    Raises:
        UsageError: a setting is unknown, out of range, or does not go with another.
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
    """Write an attached model as `path`, after checking that the file gives what the model gives.

    Args:
        model: attached, float32, on the CPU; left as it is.
        path: `.onnx`, or `.pt2` for the formats of torch; replaced whole or left alone.
        images: [B, C, H, W] to verify on; None makes some that are reduced about as much as `share` says.
        share: the thresholds' own mean FLOPs share, which the file names; None is the budget that their dial is set to,
            or else that of `images`.
        metadata: more to say in the file, JSON types.
        progress: called before each stage with its name.

    Returns:
        What the verification found.

    Raises:
        UsageError: `path` is not called as its format is.
        LTMPError: the model cannot be exported, or the export differs from it; `path` is as it was.
        MissingExtraError: a package that this format needs is not installed.
    """
    plan = plan or Plan()
    path = Path(path)
    if path.suffix != FORMATS[plan.format]:
        raise UsageError(f"{path.name} is not called as {plan.format} files are: end it in {FORMATS[plan.format]}")
    check(model)
    own = 1.0 if plan.dense else share if share is not None else learned_thresholds(model).budget
    made = images is None
    images = made_images(model, IMAGES, own) if images is None else images
    expected = expect(model, images, dense=plan.dense)
    about = {**describe_export(model, plan), **(metadata or {})}
    if own is not None or not made:
        about = {"share": expected.share.mean().item() if own is None else own, **about}
    text = {f"ltmp.{name}": value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
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
        found = verify(_open(temporary, plan, images), expected)
        if plan.int8:
            progress("quantising")
            quantize(temporary, temporary)
            found = verify_quantised(open_onnx(temporary), expected)
    return check_share(found, own, made)


def describe_export(model: nn.Module, plan: Plan) -> dict[str, Any]:
    """Metadata for an exported file."""
    about = {
        "version": __version__,
        "model": attachment(model).describe().get("architecture", type(model).__name__),
        "form": plan.form,
        "batch_size": plan.batch_size,
        "precision": "int8" if plan.int8 else "float32",
        "reduced": not plan.dense,
    }
    # other libraries keep it beside the model
    return {**about, "preprocessing": eval_settings(model)} if hasattr(model, "pretrained_cfg") else about


def _open(path: Path, plan: Plan, images: Tensor) -> Session:
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
    """An attached model's exports, reduced and dense, in a runtime.

    Args:
        engine: `onnx` (ONNX Runtime) or `openvino`.
        exported: the reduced model's file; None exports it, too, for this call only.
        plan: how to export; with `exported`, form and precision are the file's.
        threads: of the runtime; None is as many as torch uses.

    Raises:
        UsageError: no such engine.
        LTMPError: `exported` is no export of ltmp or of another model, or the dense export fails.
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
    """How an ONNX file was exported.

    Raises:
        LTMPError: not a file that `export` wrote.
    """
    about = read_metadata(path)
    try:
        return Plan(
            form=about["ltmp.form"], int8=about["ltmp.precision"] == "int8", batch_size=int(about["ltmp.batch_size"])
        )
    except KeyError as error:
        raise LTMPError(f"{path} does not say how it was exported: give a file that `ltmp export` wrote") from error
