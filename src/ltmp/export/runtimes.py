"""Open exported files in their runtimes, and wrap them as a model that `evaluate` accepts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..calls import dense as run_dense
from ..calls import is_dense, record, recording
from ..deploy import deployed
from ..errors import LTMPError, MissingExtraError, UsageError, first_line
from ..hosts.attach import attachment
from ..hosts.outputs import logits_of
from ..method.flops import Geometry
from .program import INPUT

Call = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From images [B, C, H, W] to logits [B, K] and the number of tokens after each block [B, L]."""


@dataclass(frozen=True)
class Session:
    """An exported model, ready to run on the CPU.

    Attributes:
        call: runs one batch, of size `batch` if that is fixed.
        batch: the fixed batch size, or None for any.
        shape: [C, H, W] of an image.
    """

    call: Call
    batch: int | None
    shape: tuple[int, ...]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and token counts of any number of images; a fixed batch is padded with copies of the last image.

        Raises:
            LTMPError: the images do not have the shape `shape`.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise LTMPError(
                f"images are {list(images.shape[1:])}, but this export takes {list(self.shape)}: resize them, or "
                "export with --img-size"
            )
        if self.batch is None:
            return self.call(images)
        parts = [self._call_padded(part, self.batch) for part in images.split(self.batch)]
        logits, counts = (torch.cat(values) for values in zip(*parts, strict=True))
        return logits, counts

    def _call_padded(self, images: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        missing = batch - len(images)
        if missing == 0:
            return self.call(images)
        logits, counts = self.call(torch.cat([images, images[-1:].expand(missing, *self.shape)]))
        return logits[: len(images)], counts[: len(images)]


def open_onnx(path: str | os.PathLike[str], threads: int | None = None) -> Session:
    """Open an ONNX file in ONNX Runtime, with `threads` threads (None: as many as torch uses).

    Raises:
        MissingExtraError: onnxruntime is not installed.
        UsageError: there is no such file.
        LTMPError: it is not an ONNX file, or the runtime cannot load it.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "running ONNX files") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    # errors only: it warns about shape computations that stay on the CPU
    options.log_severity_level = 3
    with _opening(path):
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    batch, *shape = session.get_inputs()[0].shape

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, counts = session.run(None, {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(counts)

    return Session(call, batch if isinstance(batch, int) else None, tuple(shape))


def open_openvino(path: str | os.PathLike[str], threads: int | None = None) -> Session:
    """Open an ONNX file in OpenVINO on the CPU, with `threads` threads (None: as many as torch uses).

    It runs in float32: OpenVINO's default on newer processors is bfloat16, which changes decisions.

    Raises:
        MissingExtraError: openvino is not installed.
        UsageError: there is no such file.
        LTMPError: it is not an ONNX file, or OpenVINO cannot load it.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "export", "running models in OpenVINO") from error
    settings = {
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": 1,
    }
    with _opening(path):
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", settings)
    batch, *shape = compiled.inputs[0].partial_shape
    request = compiled.create_infer_request()

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        results = request.infer({INPUT: images.contiguous().numpy()}, share_inputs=True)
        logits, counts = (torch.from_numpy(results[output].copy()) for output in compiled.outputs)
        return logits, counts

    return Session(call, None if batch.is_dynamic else batch.get_length(), tuple(side.get_length() for side in shape))


def open_program(path: str | os.PathLike[str]) -> Session:
    """Open a `torch.export` program, which torch runs."""
    with _opening(path):
        program = torch.export.load(os.fspath(path))
    name = program.graph_signature.user_inputs[0]
    batch, *shape = next(node for node in program.graph.nodes if node.name == name).meta["val"].shape
    return Session(program.module(), batch if isinstance(batch, int) else None, tuple(shape))


def open_package(path: str | os.PathLike[str], batch: int | None, shape: tuple[int, ...]) -> Session:
    """Open an AOTInductor package for images of `shape`; a package does not record its batch size and input shape."""
    with _opening(path):
        package = torch._inductor.aoti_load_package(os.fspath(path))
    return Session(package, batch, shape)


OPENERS: dict[str, Callable[..., Session]] = {"onnx": open_onnx, "openvino": open_openvino}
"""Runtimes of `ltmp eval --engine`."""


@contextmanager
def _opening(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the errors of opening an exported file into one sentence."""
    if not Path(path).is_file():
        raise UsageError(f"no exported model {path}: give the file that `ltmp export` wrote")
    try:
        yield
    # each runtime has its own error classes
    except Exception as error:
        raise LTMPError(f"{path} cannot be opened: {first_line(error)}") from error


class ExportedModel(nn.Module):
    """The reduced and the dense export of an attached model, with its interface, so that `evaluate` and `measure` work.

    Args:
        model: the attached model that was exported.
        reduced, dense: its two exports in the same runtime.

    Raises:
        LTMPError: an export is of another model.
    """

    def __init__(self, model: nn.Module, reduced: Session, dense: Session) -> None:
        super().__init__()
        # as on an attached model: `ltmp` is its policy, and `attachment` finds the blocks inside `model`
        self.ltmp, self.model = attachment(model).policy, model
        self.reduced, self.dense_model = reduced, dense
        self.geometry = self._geometry(model)

    def _geometry(self, model: nn.Module) -> Geometry:
        """The geometry of an image, after checking that both sessions are exports of this model."""
        blank = torch.zeros(1, *self.reduced.shape)
        with deployed(model, blank.device), record() as calls, run_dense():
            expected = (tuple(logits_of(model(blank)).shape), attachment(model).body.depth)
        for session in (self.reduced, self.dense_model):
            logits, counts = session(blank)
            actual = (tuple(logits.shape), counts.shape[1])
            if actual != expected:
                raise LTMPError(
                    f"this export gives {actual[0][-1]} logits after {actual[1]} blocks, but the model gives "
                    f"{expected[0][-1]} after {expected[1]}: give the export of this model"
                )
        return calls.geometry[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits; token counts are recorded as for any attached model."""
        logits, counts = (self.dense_model if is_dense() else self.reduced)(images)
        calls = recording()
        if calls is not None:
            calls.add(counts.float(), self.geometry)
        return logits
