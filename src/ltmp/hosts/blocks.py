"""The blocks of a host that is attached to, and what keeps a call from running them reduced."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from ..engines.body import Body, running_engine
from ..engines.hooks import is_hooked
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
    _weights: list[tuple[dict[str, Any], str]] = field(init=False)
    _unhooked: dict[bool, int] = field(init=False, default_factory=lambda: {True: -1, False: -1})
    _warned: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self._kinds = tuple(map(type, self.body.blocks))
        # one of each block says for all whether they are there
        self._weights = [next(_weights(block)) for block in self.body.blocks]

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
        if any(weights[name].is_meta for weights, name in self._weights):
            raise LTMPError(
                f"weights of this {host} are on the meta device until their layers are called (offloaded by "
                "accelerate), and a reduced model reads them itself: keep the blocks on one device, or run it inside "
                "`with ltmp.dense():`"
            )
        # nobody needs to look again before a hook is registered somewhere
        latest = RemovableHandle.next_id
        if latest not in (self._unhooked[True], self._unhooked[whole]) and self._find_hooks(whole):
            self._unhooked[whole] = latest

    def _find_hooks(self, whole: bool) -> bool:
        """Refuse hooks that would not run, and warn of those that see something else; whether there are none."""
        inside = False
        for i, block in enumerate(self.body.blocks):
            skipped = {id(m) for m in self.body.recipe.attention(block)}
            for name, module in block.named_modules():
                if not is_hooked(module) or (module is block and not whole):
                    continue
                path = f"{self.name}.{i}.{name}".rstrip(".")
                if module is block or id(module) in skipped:
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
                "[T, C]: call it inside `with ltmp.dense():` for the whole model's"
            )
        return not inside


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


def refuse_tracers(values: Iterable[Any]) -> None:
    """Refuse what would record how many tokens these very images lose, or cannot follow it."""
    if torch.jit.is_tracing():
        what = "torch.jit.trace, and what is built on it (torch.onnx.export(dynamo=False), openvino.convert_model),"
    elif any(isinstance(value, fx.Proxy) for value in values):
        what = "torch.fx, and what is built on it (create_feature_extractor),"
    elif torch.compiler.is_exporting() and running_engine() is None:
        what = "torch.export, and what is built on it (torch.onnx.export),"
    else:
        return
    raise LTMPError(
        f"{what} cannot follow a model that removes tokens: write it with ltmp.export.export(model, ...) or `ltmp "
        "export`, which gives ONNX, OpenVINO and torch.export files, or trace it inside `with ltmp.dense():`"
    )
