"""The blocks of a host that is attached to, and what keeps a call from running them reduced."""

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
from ..engines.hooks import all_hooked, is_hooked, is_own
from ..errors import LTMPError

log = logging.getLogger("ltmp")


@dataclass(eq=False)
class Blocks:
    """The blocks of a host, where it has them.

    Attributes:
        body: what runs unless a thread is told otherwise.
        owner: the module that holds the container of blocks; name: of the container there.
    """

    body: Body
    owner: nn.Module
    name: str
    _kinds: tuple[type, ...] = field(init=False)
    _links: list[tuple[nn.Module, str, nn.Module]] = field(init=False)
    _facts: list[tuple[nn.Module, str, Any]] = field(init=False)
    _weights: list[tuple[dict[str, Any], str]] = field(init=False)
    _unhooked: dict[bool, int] = field(init=False, default_factory=lambda: {True: -1, False: -1})
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._kinds = tuple(map(type, self.body.blocks))
        uncalled = [module for block in self.body.blocks for module in self.body.recipe.attention(block)]
        self._links = list(_links(self.body.blocks, {id(module) for module in uncalled}))
        self._facts = [
            (module, name, vars(module).get(name))
            for module in uncalled
            for name in _FACTS
            if name == "forward" or name in vars(module)
        ]
        # one of each block says for all whether they are there
        self._weights = [next(_weights(block)) for block in self.body.blocks]

    def __getstate__(self) -> dict[str, Any]:
        # handles of hooks are counted anew in another process
        return {**vars(self), "_unhooked": {True: -1, False: -1}}

    def check(self, whole: bool) -> None:
        """See whether a call can run reduced.

        Args:
            whole: whether all blocks run at once, so that none of them is called by its host.

        Raises:
            LTMPError: the host's blocks are not as they were when they were attached to.
        """
        blocks, host = self.body.blocks, type(self.body.host).__name__
        present = tuple(self.owner._modules[self.name]._modules.values())  # type: ignore[union-attr]
        if (present if self.body.recipe.depth(self.body.host) is None else present[: len(blocks)]) != blocks:
            raise LTMPError(
                f"the blocks of this {host} were changed after attaching, and its thresholds are for those of before: "
                "call ltmp.detach(model) first, or attach after such changes"
            )
        if tuple(map(type, blocks)) != self._kinds:
            kind = next(type(b).__name__ for b, kind in zip(blocks, self._kinds, strict=True) if type(b) is not kind)
            raise LTMPError(
                f"the blocks of this {host} became {kind}s after attaching, whose weights may be elsewhere until they "
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
        # nobody needs to look again before a hook is registered somewhere
        latest = RemovableHandle.next_id
        if latest not in (self._unhooked[True], self._unhooked[whole]) and self._find_hooks(whole):
            self._unhooked[whole] = latest

    def _check_uncalled(self, host: str) -> None:
        """Refuse what was done to modules that a reduced model does not call: it would not be seen."""
        for owner, name, module in self._links:
            now = owner._modules.get(name)
            if now is not module and not _does_nothing(now):
                raise LTMPError(
                    f"{name} of a block of this {host} was replaced after attaching (by a {type(now).__name__}), and a "
                    f"reduced model runs what was there: {_ATTACH_AGAIN}"
                )
        for module, name, value in self._facts:
            now = module.__dict__.get(name)
            if now is not value and now != value and not (name == "forward" and _runs_its_own(module)):
                raise LTMPError(
                    f"{type(module).__name__}.{name} of this {host} was changed after attaching, and a reduced model "
                    f"does not call that module: {_ATTACH_AGAIN}"
                )

    def _find_hooks(self, whole: bool) -> bool:
        """Refuse hooks that would not run, and warn of those that see something else; whether there are none."""
        inside = all_hooked()
        for i, block in enumerate(self.body.blocks):
            skipped = {id(m) for m in self.body.recipe.attention(block)}
            for name, module in block.named_modules():
                uncalled = module is block or id(module) in skipped
                if not is_hooked(module, called=not uncalled) or (module is block and not whole):
                    continue
                path = f"{self.name}.{i}.{name}".rstrip(".")
                if uncalled:
                    raise LTMPError(
                        f"hooks on {path} would not run, as a reduced model does not call it: call the model inside "
                        "`with ltmp.dense():`; features after each block, every patch in its place, are what "
                        "forward_intermediates gives, and what hooks on blocks see inside `with ltmp.unmerge():`"
                    )
                inside = True
        if inside and not self._warned:
            self._warned = True
            log.warning(
                "hooks inside the blocks of a reduced model see the tokens that are left, those of all images as rows "
                "[T, C], and none of its attentions: call it inside `with ltmp.dense():` for the whole model's"
            )
        return not inside


_FACTS = (
    "forward", "p", "dropout", "attention_dropout", "dropout_prob", "scale", "scaling", "num_heads",
    "num_attention_heads",
)  # fmt: skip
"""Attributes of an attention that say what it computes: adapters and attention maps replace its forward."""


def _does_nothing(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0)


def _runs_its_own(module: nn.Module) -> bool:
    """Whether the forward that was set on a module is its class's, by accelerate with inputs that are moved before."""
    own = vars(module)
    return is_own(own.get("_old_forward") if "_hf_hook" in own else own.get("forward"), type(module))


_ATTACH_AGAIN = "call ltmp.detach(model) and attach again after such changes, or run it inside `with ltmp.dense():`"


def _links(blocks: Iterable[nn.Module], uncalled: set[int]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Where modules that are not called hang: their owner, their name there, and they themselves."""
    for block in blocks:
        for owner in block.modules():
            for name, module in owner._modules.items():
                if id(module) in uncalled and module is not None:
                    yield owner, name, module


def _weights(block: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where the weights of a block are looked up."""
    parts = (module._parameters for module in block.modules())
    return ((weights, name) for weights in parts for name, weight in weights.items() if weight is not None)


def refuse_replica(body: Body, args: tuple[Any, ...]) -> None:
    """Refuse images elsewhere than the model: `DataParallel`'s replicas, whose blocks are those of the original."""
    images = args[0] if args else None
    if not isinstance(images, Tensor) or images.device.type == "cpu":
        return
    own = next((tensor.device for tensor in (*body.policy.parameters(), *body.policy.buffers())), images.device)
    if images.device != own:
        raise LTMPError(
            f"these images are on {images.device} and the attached model is on {own}: bring them together; where "
            "torch.nn.DataParallel made copies, use DistributedDataParallel, a process for each device"
        )


def _refuse_transforms(values: list[Any]) -> None:
    """Refuse images without values, and all images of a batch as if they were one."""
    if any(isinstance(value, FakeTensor) for value in values) and running_engine() is None:
        raise LTMPError(
            "a reduced model does not know how many tokens images without values (FakeTensorMode) would lose: call it "
            "inside `with ltmp.dense():`"
        )
    levels = torch._C._functorch.get_interpreter_stack() or []
    if any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels):
        raise LTMPError(
            "torch.func.vmap cannot follow a model that removes other tokens from each image: call it on the images "
            "one after the other, or inside `with ltmp.dense():`"
        )


def refuse_tracers(values: Iterable[Any]) -> None:
    """Refuse what would record how many tokens these very images lose, or cannot follow it."""
    values = list(values)
    if torch.jit.is_tracing():
        what = "torch.jit.trace, and what is built on it (torch.onnx.export(dynamo=False), openvino.convert_model),"
    elif any(isinstance(value, fx.Proxy) for value in values):
        what = "torch.fx, and what is built on it (create_feature_extractor),"
    elif torch.compiler.is_exporting() and running_engine() is None:
        what = "torch.export, and what is built on it (torch.onnx.export),"
    else:
        if not torch.compiler.is_compiling():
            _refuse_transforms(values)
        return
    raise LTMPError(
        f"{what} cannot follow a model that removes tokens: write it with ltmp.export.export(model, ...) or `ltmp "
        "export`, which gives ONNX, OpenVINO and torch.export files, or trace it inside `with ltmp.dense():`"
    )
