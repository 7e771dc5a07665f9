"""On a CPU the packed engine computes linear layers of standard blocks with oneDNN, and others with their modules."""

from __future__ import annotations

import pytest
import torch
from timm.layers import SwiGLU
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ltmp
from helpers import assert_close, attach_reducing, random_images, run_recorded, tiny_vit
from ltmp.engines import onednn
from ltmp.engines.plain import look
from ltmp.hosts.timm import RECIPE

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this torch has no oneDNN linear operator",
)

KINDS = {
    "plain": {},
    "layer scale": {"init_values": 0.5},
    "qk norm": {"qk_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "tanh gelu": {"act_layer": "gelu_tanh"},
}


def by_onednn(block: nn.Module, x: torch.Tensor) -> bool:
    return onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0].qkv.func is onednn._qkv


@needs_onednn
@pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS.keys())
@torch.inference_mode()
def test_halves_are_those_of_the_host(kwargs: dict[str, object]) -> None:
    block = tiny_vit(**kwargs).blocks[0]
    x = torch.randn(37, 16)
    assert by_onednn(block, x)
    half = onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0]
    for got, expected in zip(half.qkv(x), RECIPE.qkv(block, x), strict=True):
        assert_close(got, expected, 1e-5, "qkv")
    y = torch.randn_like(x)
    assert_close(half.out(x, y), x + RECIPE.out(block, y), 1e-5, "out")
    assert_close(half.mlp(x), x + RECIPE.mlp(block, x), 1e-5, "mlp")


@needs_onednn
def test_the_reduced_model_uses_it_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(5)
    model = attach_reducing(tiny_vit(), images)
    used = []
    mlp = onednn._mlp
    monkeypatch.setattr(onednn, "_mlp", lambda *args: used.append(1) or mlp(*args))
    with torch.inference_mode():
        fast, counts = run_recorded(model, images)
        assert len(used) == 3
        monkeypatch.setattr(onednn, "_applies", lambda x: False)
        own, own_counts = run_recorded(model, images)
    assert len(used) == 3
    assert torch.equal(counts, own_counts)
    assert_close(fast, own, 1e-5, "logits")


def test_what_is_not_a_plain_inference_block_runs_its_own_modules() -> None:
    x = torch.randn(7, 16)
    block = tiny_vit().blocks[0]
    assert not by_onednn(block, x), "gradients are on"
    with torch.inference_mode():
        assert not by_onednn(block, x.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            assert not by_onednn(block, x)
        with FlopCounterMode(display=False) as counter:
            assert not by_onednn(block, x)
            onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0].out(x, x)
        assert counter.get_total_flops() == 2 * 7 * 16 * 16
        assert not by_onednn(block.train(), x)
        assert not by_onednn(tiny_vit(mlp_layer=SwiGLU).blocks[0], x)


@torch.inference_mode()
def test_hooks_and_adapters_on_linear_layers_run() -> None:
    x = torch.randn(7, 16)
    called = []
    block = tiny_vit().blocks[0]
    block.mlp.fc1.register_forward_hook(lambda *_: called.append("fc1"))
    assert not by_onednn(block, x)
    onednn.halves(RECIPE, (block,), x, look({}, RECIPE, (block,)))[0].mlp(x)
    assert called == ["fc1"]

    class Adapter(nn.Linear):
        pass

    block = tiny_vit().blocks[0]
    block.attn.proj = Adapter(16, 16).eval()
    assert not by_onednn(block, x)


def test_gradients_still_pass_the_packed_engine() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    pixels = images.clone().requires_grad_()
    model(pixels).sum().backward()
    assert pixels.grad is not None
    assert pixels.grad.abs().sum() > 0
    ltmp.detach(model)
