"""From an attached model to a `torch.export` program, and from that to an AOTInductor package."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..calls import dense as run_dense
from ..calls import record
from ..deploy import evaluating
from ..engines.body import running
from ..errors import LTMPError, UsageError, first_line
from ..hosts.attach import attachment, is_attached
from ..hosts.outputs import logits_of
from ..method.thresholds import Thresholds
from .forms import Form
from .layouts import FORMS

INPUT, OUTPUTS = "images", ("logits", "counts")


class Exportable(nn.Module):
    """The module to trace, from images [B, C, H, W] to logits [B, K] and the number of tokens after each block [B, L].

    Args:
        model: attached, in evaluation mode.
        form: one of `FORMS`.
        dense: run as if nothing were attached, for comparison.
    """

    def __init__(self, model: nn.Module, form: str, dense: bool = False) -> None:
        super().__init__()
        self.model = model
        thresholds, body = learned_thresholds(model), attachment(model).body
        merge, prune = (tuple(values.tolist()) for values in (thresholds.merge, thresholds.prune))
        self.form = Form(FORMS[form], body.active(), merge, prune)
        self.dense = dense

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with running(self.form), record() as calls, run_dense() if self.dense else nullcontext():
            logits = logits_of(self.model(images))
        return logits, torch.cat(calls.kept).long()


def trace(
    model: nn.Module,
    form: str = "batch",
    *,
    shape: tuple[int, ...] | None = None,
    dense: bool = False,
    batch_size: int = 1,
    compiled: bool = False,
) -> ExportedProgram:
    """Trace an attached model in one form.

    Args:
        model: attached, float32, on the CPU; left unchanged.
        form: `single` (one image, data-dependent number of tokens), `batch` (any number of images, data-dependent
            numbers of tokens) or `static` (`batch_size` images, nothing data-dependent).
        shape: [C, H, W] of an image; None is the shape that the model was built for.
        dense: trace the model as if nothing were attached.
        batch_size: number of images of the static form.
        compiled: whether AOTInductor will compile the program, for which `single` is traced as a batch of one.

    Raises:
        UsageError: the form is unknown, or the batch size does not fit it.
        LTMPError: nothing is attached, or the model cannot be traced.
    """
    check_form(form, batch_size)
    check(model)
    images = torch.zeros({"static": batch_size, "single": 1}.get(form, 2), *(shape or image_shape(model)))
    shapes = {INPUT: {0: Dim("batch", min=1, max=1 << 16)}} if form == "batch" else None
    layout = "batch" if compiled and form == "single" else form
    with evaluating(model), torch.no_grad():
        try:
            return torch.export.export(Exportable(model, layout, dense), (images,), dynamic_shapes=shapes, strict=False)
        # a model may contain anything that the tracer does not support
        except Exception as error:
            raise LTMPError(f"torch.export cannot trace this {type(model).__name__}: {first_line(error)}") from error


def check_form(form: str, batch_size: int) -> None:
    """Raise UsageError if the form is unknown or does not allow the batch size."""
    if form not in FORMS:
        raise UsageError(f"unknown form {form!r}: expected one of {', '.join(FORMS)}")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}: expected 1 or more")
    if batch_size > 1 and form != "static":
        raise UsageError(f"batch_size is for the static form; {form!r} takes what it is given")


def check(model: nn.Module) -> None:
    """Raise LTMPError if the model cannot be exported."""
    if not is_attached(model):
        raise LTMPError("nothing to export: attach thresholds first (ltmp.load(model, file) or ltmp.attach(model))")
    learned_thresholds(model)
    for parameter in model.parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise LTMPError(
                f"this model is {parameter.dtype} on {parameter.device}, and exports are made of float32 models on the "
                "CPU: call model.cpu().float() first"
            )


def learned_thresholds(model: nn.Module) -> Thresholds:
    """The thresholds of an attached model.

    Raises:
        LTMPError: the model runs at fixed rates, or with a floor or a ceiling, which exported forms do not support.
    """
    policy = attachment(model).policy
    if not isinstance(policy, Thresholds):
        raise LTMPError(
            f"the method {policy.config.variant!r} runs at fixed rates; only learned thresholds are exported"
        )
    if policy.bounded:
        raise LTMPError("a floor or a ceiling of tokens cannot be exported: attach with neither")
    return policy


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """[C, H, W] that the model was built for.

    Raises:
        LTMPError: the host does not report it.
    """
    host: Any = attachment(model).host
    size = (
        getattr(getattr(host, "patch_embed", None), "img_size", None)
        or getattr(host, "image_size", None)
        or getattr(host.__dict__.get("config"), "image_size", None)
    )
    if not size:
        raise LTMPError(f"this {type(host).__name__} does not say what images it takes: give images to verify it on")
    height, width = (size, size) if isinstance(size, int) else size
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    return channels, height, width


def write_program(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Write a `.pt2` file for `torch.export.load`, with the metadata as extra files."""
    torch.export.save(program, path, extra_files=dict(metadata))


def write_package(program: ExportedProgram, path: Path, metadata: dict[str, str]) -> None:
    """Compile with AOTInductor and write a `.pt2` file for `torch._inductor.aoti_load_package`, or for C++.

    Raises:
        LTMPError: there is no C++ compiler, or compiling fails.
    """
    from torch._inductor import aoti_compile_and_package

    if not has_compiler():
        raise LTMPError("AOTInductor needs a C++ compiler, and there is no g++ or clang++ here: install one")
    try:
        aoti_compile_and_package(
            program, package_path=str(path), inductor_configs={"aot_inductor.metadata": dict(metadata)}
        )
    except Exception as error:
        raise LTMPError(f"AOTInductor cannot compile this program: {first_line(error)}") from error


def has_compiler() -> bool:
    """Whether there is a C++ compiler that inductor can find."""
    return any(shutil.which(name) for name in ("g++", "clang++"))
