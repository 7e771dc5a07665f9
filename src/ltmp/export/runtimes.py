"""Exported files in the runtimes that run them, and as a model that `evaluate` takes."""

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
"""images [B, C, H, W] to logits [B, K] and tokens after each block [B, L]."""


@dataclass(frozen=True)
class Session:
    """An exported model, ready to run on the CPU.

    Attributes:
        call: runs one batch of the size it was made for.
        batch: that size, or None for any.
        shape: [C, H, W] of an image.
    """

    call: Call
    batch: int | None
    shape: tuple[int, ...]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and counts of any number of images; a fixed batch is filled up with the last image.

        Raises:
            LTMPError: the images have another shape than the model's.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise LTMPError(
                f"images are {list(images.shape[1:])}, but this export takes {list(self.shape)}: resize them, or "
                "export with --img-size"
            )
        if self.batch is None:
            return self.call(images)
        parts = [self._filled(part) for part in images.split(self.batch)]
        logits, counts = (torch.cat(values) for values in zip(*parts, strict=True))
        return logits, counts

    def _filled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        missing = (self.batch or 0) - len(images)
        if missing == 0:
            return self.call(images)
        logits, counts = self.call(torch.cat([images, images[-1:].expand(missing, *self.shape)]))
        return logits[: len(images)], counts[: len(images)]


def open_onnx(path: str | os.PathLike[str], threads: int | None = None) -> Session:
    """In ONNX Runtime, with `threads` of them (None: as many as torch uses).

    Raises:
        MissingExtraError: onnxruntime is not installed.
        LTMPError: not an ONNX file, or one that the runtime refuses.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "export", "running ONNX files") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    # errors only: it warns of shape computations that it keeps on the CPU
    options.log_severity_level = 3
    with _readable(path):
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    batch, *shape = session.get_inputs()[0].shape

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        logits, counts = session.run(None, {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits), torch.from_numpy(counts)

    return Session(call, batch if isinstance(batch, int) else None, tuple(shape))


def open_openvino(path: str | os.PathLike[str], threads: int | None = None) -> Session:
    """In OpenVINO on the CPU, in float32: its default on newer processors is bfloat16, which moves decisions.

    Raises:
        MissingExtraError: openvino is not installed.
        LTMPError: not an ONNX file, or one that OpenVINO refuses.
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
    with _readable(path):
        compiled = openvino.Core().compile_model(os.fspath(path), "CPU", settings)
    batch, *shape = compiled.inputs[0].partial_shape
    request = compiled.create_infer_request()

    def call(images: Tensor) -> tuple[Tensor, Tensor]:
        results = request.infer({INPUT: images.contiguous().numpy()}, share_inputs=True)
        logits, counts = (torch.from_numpy(results[output].copy()) for output in compiled.outputs)
        return logits, counts

    return Session(call, None if batch.is_dynamic else batch.get_length(), tuple(side.get_length() for side in shape))


def open_program(path: str | os.PathLike[str], threads: int | None = None) -> Session:
    """A `torch.export` program, run by torch; `threads` is torch's own affair."""
    with _readable(path):
        program = torch.export.load(os.fspath(path))
    shape = program.graph_signature.user_inputs[0]
    batch, *sides = next(n for n in program.graph.nodes if n.name == shape).meta["val"].shape
    return Session(program.module(), batch if isinstance(batch, int) else None, tuple(sides))


def open_package(path: str | os.PathLike[str], batch: int | None, shape: tuple[int, ...]) -> Session:
    """An AOTInductor package, which does not say what it takes."""
    with _readable(path):
        package = torch._inductor.aoti_load_package(os.fspath(path))
    return Session(package, batch, shape)


OPENERS: dict[str, Callable[..., Session]] = {"onnx": open_onnx, "openvino": open_openvino}
"""What `ltmp eval --engine` runs exported files with."""


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    if not Path(path).is_file():
        raise UsageError(f"no exported model {path}: give the file that `ltmp export` wrote")
    try:
        yield
    # each runtime has error classes of its own
    except Exception as error:
        raise LTMPError(f"{path} cannot be opened: {first_line(error)}") from error


class ExportedModel(nn.Module):
    """A reduced and a dense session that answer as the attached model does, so that `evaluate` and `measure` take them.

    Args:
        model: the attached model that was exported.
        reduced, dense: its two exports in the same runtime.
    """

    def __init__(self, model: nn.Module, reduced: Session, dense: Session) -> None:
        """Raises LTMPError where a session is of another model."""
        super().__init__()
        # `evaluate` knows an attached model by its thresholds, and finds its blocks inside
        self.ltmp, self.model = attachment(model).policy, model
        self.reduced, self.dense_model = reduced, dense
        self.geometry = self._geometry(model)

    def _geometry(self, model: nn.Module) -> Geometry:
        """Geometry of an image, after checking that the sessions are of this model."""
        blank = torch.zeros(1, *self.reduced.shape)
        with deployed(model, blank.device), record() as calls, run_dense():
            wanted = (tuple(logits_of(model(blank)).shape), attachment(model).body.depth)
        for session in (self.reduced, self.dense_model):
            logits, counts = session(blank)
            found = (tuple(logits.shape), counts.shape[1])
            if found != wanted:
                raise LTMPError(
                    f"this export gives {found[0][-1]} logits after {found[1]} blocks, but the model gives "
                    f"{wanted[0][-1]} after {wanted[1]}: give the export of this model"
                )
        return calls.geometry[0]

    def forward(self, images: Tensor) -> Tensor:
        """Logits; tokens go to the record as with any attached model."""
        logits, counts = (self.dense_model if is_dense() else self.reduced)(images)
        calls = recording()
        if calls is not None:
            calls.add(counts.float(), self.geometry)
        return logits
