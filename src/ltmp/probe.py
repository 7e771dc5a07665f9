"""What a model's tokens are read through, where the thresholds' scores ask for it."""

from __future__ import annotations

from abc import ABC

import torch
from torch import Tensor, nn

from .config import LTMPConfig
from .errors import LTMPError
from .ops.probe.reference import WIDTH, probe


class Probing(nn.Module, ABC):
    """What holds a probe: a linear map of each block, learned from gradients. Abstract: `Thresholds` decides by it.

    Attributes:
        merge: float32 [L], on the model's device.
        depth: number of blocks, L.
        probe: float32 [L, C + 1, WIDTH + 2], see `ops.probe.reference.probe`; None until one is learned or loaded.
    """

    merge: nn.Parameter
    depth: int
    config: LTMPConfig
    probe: Tensor | None

    def set_probe(self, probe: Tensor | None) -> None:
        """Give the model what its tokens are read through, or take it away.

        Raises:
            ValueError: it is for another number of blocks, or not a probe at all.
        """
        if probe is None:
            self.probe = None
            return
        if probe.ndim != 3 or probe.shape[0] != self.depth or probe.shape[2] != WIDTH + 2:
            raise ValueError(
                f"a probe of shape {tuple(probe.shape)}, but this model's is [{self.depth}, width + 1, {WIDTH + 2}]: "
                "use one learned on this architecture"
            )
        if not probe.isfinite().all():
            raise ValueError("a probe holds NaN or infinity: the file or the run that made it is broken")
        self.probe = probe.detach().to(self.merge.device, torch.float32, copy=True).contiguous()

    def probed(self, block: int, x: Tensor) -> Tensor | None:
        """See `Policy.probed`."""
        return probe(x, self.probe_of(block)) if self.config.asks_probe else None

    def probe_of(self, block: int) -> Tensor:
        """float32 [C + 1, WIDTH + 2], the probe of a block.

        Raises:
            LTMPError: there is none.
        """
        if self.probe is None:
            raise LTMPError(
                "these thresholds go by a probe, and there is none: learn one (`ltmp dial`, `ltmp learn` or "
                "ltmp.learning.learn_probe), or load the file that has it"
            )
        return self.probe[block]

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """The probe comes along, or goes where the thresholds that are loaded had none."""
        if f"{prefix}merge" in state_dict:
            try:
                self.set_probe(state_dict.get(f"{prefix}probe"))
            except ValueError as error:
                error_msgs.append(str(error))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
