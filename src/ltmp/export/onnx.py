"""Write a program as ONNX with torch's dynamo exporter."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from ..errors import LTMPError, MissingExtraError, UsageError, first_line
from .program import INPUT, OUTPUTS

OPSET = 20
"""The first opset with a Gelu operator; LayerNormalization came with 17."""

OPSETS = range(18, 24)
"""Opsets that torch's exporter writes."""

_INLINE = 1_900_000_000
"""Most bytes of weights that are stored in the file itself: a protocol buffer is limited to 2 GB."""


def write_onnx(program: ExportedProgram, path: Path, metadata: dict[str, str], *, opset: int = OPSET) -> None:
    """Write `program` as ONNX. If the weights exceed 2 GB, they go to a second file, `path` + ".data".

    Raises:
        UsageError: the opset is not one that the exporter writes.
        MissingExtraError: onnx or onnxscript is not installed.
        LTMPError: the exporter fails.
    """
    check_opset(opset)
    try:
        import onnx_ir
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript", "export", "ONNX export") from error
    import torch

    try:
        with _quiet():
            exported: Any = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=[INPUT], output_names=list(OUTPUTS)
            )
    # each step of the exporter has its own error class
    except Exception as error:
        raise LTMPError(f"torch.onnx cannot export this program: {first_line(error)}") from error
    model = exported.model
    model.metadata_props.update(metadata)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = onnx_ir.Shape([d if isinstance(d, int) else "batch" for d in value.shape])
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    exported.save(str(path), external_data=size > _INLINE)


def check_opset(opset: int) -> None:
    """Raise UsageError if the exporter does not write this opset."""
    if opset not in OPSETS:
        raise UsageError(
            f"opset {opset}: torch's exporter writes {OPSETS[0]} to {OPSETS[-1]}, and {OPSET} is the default"
        )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of an ONNX file.

    Raises:
        MissingExtraError: onnx is not installed.
        UsageError: there is no such file.
        LTMPError: it is not an ONNX file.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "export", "reading ONNX files") from error
    try:
        return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    except FileNotFoundError:
        raise UsageError(f"no exported model {path}: give the file that `ltmp export` wrote") from None
    # protobuf's error classes differ between its implementations
    except Exception as error:
        raise LTMPError(f"{path} is not a whole ONNX file: export it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress report and warnings; the result is verified anyway."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
