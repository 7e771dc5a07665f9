"""What several tests need: tiny models with lively weights, and comparisons that raise by themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import ltmp
import reference
from ltmp.calls import unmerging
from ltmp.hosts.attach import attachment, thresholds_of
from ltmp.hosts.forward import run_all
from ltmp.method.dial import Dial
from ltmp.ops.probe.reference import LIFT, WIDTH

TINY: dict[str, Any] = {
    "img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 5,
}  # fmt: skip


@torch.no_grad()
def liven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that attention is far from uniform; timm's own start at nearly nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.startswith("ltmp.") or parameter.ndim == 0:
            continue
        scale = 0.02 if name.endswith("bias") else 1.5 / (parameter.shape or (1,))[-1] ** 0.5
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1 and name.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif name.endswith("gamma"):
            parameter.copy_(0.5 + 0.1 * noise)
        else:
            parameter.copy_(scale * noise)
    return model


def tiny_vit(cls: type[nn.Module] = VisionTransformer, *, seed: int = 0, **kwargs: Any) -> Any:
    """A small model in eval mode, the same for the same arguments."""
    return liven(cls(**{**TINY, **kwargs}), seed).eval()


def random_images(count: int, model: Any = None, *, size: int = 16, seed: int = 0) -> Tensor:
    """[B, 3, H, W] smooth noise: neighbouring patches are alike, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, max(2, size // 4), max(2, size // 4), generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, size, mode="bilinear") + 0.3 * fine


@torch.no_grad()
def embed(model: Any, images: Tensor) -> Tensor:
    """[B, N, C], what enters the first block."""
    return model.norm_pre(model._pos_embed(model.patch_embed(images)))


def references(model: Any, images: Tensor) -> list[reference.OneImage]:
    return [reference.OneImage(model, x, model.num_prefix_tokens) for x in embed(model, images)]


def attach_reducing(model: Any, images: Tensor, variant: str = "ltmp", at: float = 0.75) -> Any:
    """Attach with thresholds at which these images lose tokens in each block, none of them near a score."""
    merge, prune = reference.calibrate(references(model, images), variant, at)
    ltmp.attach(model, ltmp.LTMPConfig(variant=variant))
    thresholds_of(model).set(merge, prune)
    return model


def run_blocks(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """All blocks of an attached model on x [B, N, C], as its host would call them."""
    body = attachment(model).body
    if body.reduces() and not unmerging():
        return run_all(body, x, args, kwargs)
    for block in body.blocks:
        x = block(x, *args, **kwargs)
    return x


def run_recorded(model: nn.Module, *inputs: Any, **named: Any) -> tuple[Any, Tensor]:
    """The output and tokens after each block, [B, L]."""
    with ltmp.record() as calls:
        output = model(*inputs, **named)
    return output, torch.cat(calls.kept)


def assert_close(actual: Tensor, expected: Tensor, atol: float, what: str = "values") -> None:
    """Shapes equal, finite where expected is, and nowhere further apart than `atol`."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = (actual.double() - expected.double()).abs().max().item() if actual.numel() else 0.0
    assert error <= atol, f"{what} differ by {error:.2e}, allowed {atol:.0e}"


def make_probe(depth: int, width: int = TINY["embed_dim"], *, seed: int = 0) -> Tensor:
    """A random probe that lifts tokens as learned ones do, and finds some of them to matter more than others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(depth, width + 1, WIDTH + 2, generator=generator)
    weight[:, :-1, :WIDTH] /= (LIFT * width * WIDTH) ** 0.5
    weight[:, :-1, WIDTH:] /= width**0.5
    weight[:, -1] = 0
    weight[:, :, WIDTH - 1] = 0
    weight[:, -1, WIDTH - 1] = 1
    return weight.half().float()


def make_dial(depth: int, *, knots: int = 5, seed: int = 0, lowest: float = 0.3, highest: float = 0.95) -> Dial:
    """Random thresholds that fall and rise with the budget, as learned ones do."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.linspace(lowest, highest, knots)
    spread = torch.rand(depth, generator=generator)
    merge = 0.3 + 0.6 * share[:, None] * (0.5 + spread / 2)
    prune = 0.05 * (1 - share[:, None]) * (0.1 + spread)
    return Dial(share, merge, prune, share[:, None] * torch.linspace(17, 5, depth))


def colour_image(colour: tuple[int, int, int], size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, colour)


def plain_torch() -> AbstractContextManager[Any]:
    """The packed engine without compiled plans, as where numba is not installed."""
    return patch("ltmp.engines.compiled.unavailable", return_value="is not wanted here")
