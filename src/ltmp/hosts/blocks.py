"""The blocks of an attached host, and the checks that refuse a call that they cannot run reduced."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from ..engines.body import Body, running_engine
from ..engines.hooks import all_hooked, is_class_forward, is_hooked
from ..errors import LTMPError

log = logging.getLogger("ltmp")


@dataclass(eq=False)
class Blocks:
    """The blocks of a host and where it keeps them.

    A reduced model calls the layers inside an attention module, but never the module itself. Changes to such modules
    after attaching would be silently ignored, so `check` looks for them in every call.

    Attributes:
        body: what runs, unless the thread overrides it (`engines.body.running`).
        owner: module that holds the container of the blocks.
        name: name of the container there.
    """

    body: Body
    owner: nn.Module
    name: str
    _classes: tuple[type, ...] = field(init=False)
    _uncalled: list[tuple[nn.Module, str, nn.Module]] = field(init=False)
    _settings: list[tuple[nn.Module, str, Any]] = field(init=False)
    _weights: list[tuple[dict[str, Any], str]] = field(init=False)
    _unhooked: dict[bool, int] = field(init=False, default_factory=lambda: {True: -1, False: -1})
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._classes = tuple(map(type, self.body.blocks))
        uncalled = [module for block in self.body.blocks for module in self.body.recipe.attention(block)]
        self._uncalled = list(_find_children(self.body.blocks, {id(module) for module in uncalled}))
        self._settings = [
            (module, name, vars(module).get(name))
            for module in uncalled
            for name in _SETTINGS
            if name == "forward" or name in vars(module)
        ]
        # one weight per block is enough to notice offloading
        self._weights = [next(_find_weights(block)) for block in self.body.blocks]

    def __getstate__(self) -> dict[str, Any]:
        # hook ids are not comparable between processes
        return {**vars(self), "_unhooked": {True: -1, False: -1}}

    def check(self, at_once: bool) -> None:
        """Check that a call can run reduced.

        Args:
            at_once: whether all blocks run in one go, so that the host calls none of them.

        Raises:
            LTMPError: the host's blocks are not as they were when attached to.
        """
        blocks, host = self.body.blocks, type(self.body.host).__name__
        present = tuple(self.owner._modules[self.name]._modules.values())  # type: ignore[union-attr]
        if (present if self.body.recipe.depth(self.body.host) is None else present[: len(blocks)]) != blocks:
            raise LTMPError(
                f"the blocks of this {host} were changed after attaching, and its thresholds are for the previous "
                "ones: call ltmp.detach(model) first, or attach after such changes"
            )
        if tuple(map(type, blocks)) != self._classes:
            cls = next(type(b).__name__ for b, cls in zip(blocks, self._classes, strict=True) if type(b) is not cls)
            raise LTMPError(
                f"the blocks of this {host} became {cls}s after attaching, whose weights may be elsewhere until they "
                "are called (FSDP): shard the model as a whole and not its blocks, or run it inside "
                "`with ltmp.dense():`"
            )
        if any(name in weights and weights[name].is_meta for weights, name in self._weights):
            raise LTMPError(
                f"weights of this {host} are on the meta device until their layers are called (offloaded by "
                "accelerate), and a reduced model reads them itself: keep the blocks on one device, or run it inside "
                "`with ltmp.dense():`"
            )
        self._check_uncalled(host)
        # ids of hooks count up: search again only after another hook was registered anywhere
        latest = RemovableHandle.next_id
        if latest not in (self._unhooked[True], self._unhooked[at_once]) and self._check_hooks(at_once):
            self._unhooked[at_once] = latest

    def _check_uncalled(self, host: str) -> None:
        """Refuse changes to modules that a reduced model does not call, since they would have no effect."""
        for owner, name, module in self._uncalled:
            present = owner._modules.get(name)
            if present is not module and not _does_nothing(present):
                raise LTMPError(
                    f"{name} of a block of this {host} was replaced after attaching (by a {type(present).__name__}), "
                    f"and a reduced model runs what was there: {_ATTACH_AGAIN}"
                )
        for module, name, value in self._settings:
            present = module.__dict__.get(name)
            if present is not value and present != value and not (name == "forward" and _runs_class_forward(module)):
                raise LTMPError(
                    f"{type(module).__name__}.{name} of this {host} was changed after attaching, and a reduced model "
                    f"does not call that module: {_ATTACH_AGAIN}"
                )

    def _check_hooks(self, at_once: bool) -> bool:
        """Refuse hooks that would not run, and warn once of those that see reduced features.

        Returns:
            Whether there are no hooks at all.
        """
        hooked = all_hooked()
        for i, block in enumerate(self.body.blocks):
            attention = {id(module) for module in self.body.recipe.attention(block)}
            for name, module in block.named_modules():
                uncalled = module is block or id(module) in attention
                if not is_hooked(module, called=not uncalled) or (module is block and not at_once):
                    continue
                path = f"{self.name}.{i}.{name}".rstrip(".")
                if uncalled:
                    raise LTMPError(
                        f"hooks on {path} would not run, as a reduced model does not call it: call the model inside "
                        "`with ltmp.dense():`; for features after each block, with every patch in its place, use "
                        "forward_intermediates, or hooks on blocks inside `with ltmp.unmerge():`"
                    )
                hooked = True
        if hooked and not self._warned:
            self._warned = True
            log.warning(
                "hooks inside the blocks of a reduced model see only the tokens that are left, those of all images as "
                "rows [T, C], and no attention module: call the model inside `with ltmp.dense():` to hook all of it"
            )
        return not hooked


_SETTINGS = (
    "forward", "p", "dropout", "attention_dropout", "dropout_prob", "scale", "scaling", "num_heads",
    "num_attention_heads",
)  # fmt: skip
"""Attributes that determine what an attention module computes; adapters and attention maps replace its `forward`."""

_ATTACH_AGAIN = "call ltmp.detach(model) and attach again after such changes, or run it inside `with ltmp.dense():`"


def _does_nothing(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _runs_class_forward(module: nn.Module) -> bool:
    """Whether the `forward` set on a module is that of its class: restored, or wrapped by accelerate to move inputs."""
    attributes = vars(module)
    forward = attributes.get("_old_forward") if "_hf_hook" in attributes else attributes.get("forward")
    return is_class_forward(forward, type(module))


def _find_children(blocks: Iterable[nn.Module], wanted: set[int]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Yield (parent, name, module) for modules in the blocks whose ids are `wanted`."""
    for block in blocks:
        for parent in block.modules():
            for name, module in parent._modules.items():
                if id(module) in wanted and module is not None:
                    yield parent, name, module


def _find_weights(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield where the weights of a block are looked up: the dictionary of a module's parameters, and the name in it."""
    for module in block.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                yield module._parameters, name


def refuse_replica(body: Body, args: tuple[Any, ...]) -> None:
    """Refuse images on another device than the model: replicas of `DataParallel` would run the original's blocks."""
    images = args[0] if args else None
    if not isinstance(images, Tensor) or images.device.type == "cpu":
        return
    device = next((tensor.device for tensor in (*body.policy.parameters(), *body.policy.buffers())), images.device)
    if images.device != device:
        raise LTMPError(
            f"these images are on {images.device} and the attached model is on {device}: move them to one device; if "
            "torch.nn.DataParallel made replicas, use DistributedDataParallel, with one process per device"
        )


def refuse_tracers(values: Iterable[Any]) -> None:
    """Refuse tracers and transforms, which would record the token counts of these images, or cannot follow them."""
    values = list(values)
    if torch.jit.is_tracing():
        tracer = "torch.jit.trace, and what is built on it (torch.onnx.export(dynamo=False), openvino.convert_model),"
    elif any(isinstance(value, fx.Proxy) for value in values):
        tracer = "torch.fx, and what is built on it (create_feature_extractor),"
    elif torch.compiler.is_exporting() and running_engine() is None:
        tracer = "torch.export, and what is built on it (torch.onnx.export),"
    else:
        if not torch.compiler.is_compiling():
            _refuse_transforms(values)
        return
    raise LTMPError(
        f"{tracer} cannot follow a model that removes tokens: write it with ltmp.export.export(model, ...) or `ltmp "
        "export`, which gives ONNX, OpenVINO and torch.export files, or trace it inside `with ltmp.dense():`"
    )


def _refuse_transforms(values: list[Any]) -> None:
    """Refuse tensors without data (FakeTensorMode) and `torch.func.vmap`."""
    if any(isinstance(value, FakeTensor) for value in values) and running_engine() is None:
        raise LTMPError(
            "a reduced model cannot determine how many tokens images without data (FakeTensorMode) would lose: call it "
            "inside `with ltmp.dense():`"
        )
    levels = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise LTMPError(
            "torch.func.vmap cannot follow a model that removes other tokens from each image: call it on one image at "
            "a time, or inside `with ltmp.dense():`"
        )
