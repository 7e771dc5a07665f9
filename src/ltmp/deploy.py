"""A model made ready to be measured, scored with or exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def deployed(model: nn.Module, device: torch.device, *, amp: torch.dtype | None = None) -> Iterator[None]:
    """Evaluation mode without gradients on `device` inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.to(device).eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, amp, enabled=amp is not None):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
