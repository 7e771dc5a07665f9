"""The FLOPs formula by hand, and against torch's own counter on packed runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers import SwiGLU
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import ltmp
from helpers import attach_reducing, embed, random_images, run_blocks, tiny_vit
from ltmp.hosts.attach import attachment
from ltmp.method.flops import Geometry, block_costs, flops_share


def test_nothing_removed_costs_everything() -> None:
    geometry = Geometry(tokens=197, width=384, mlp_ratio=(4.0,) * 12)
    assert flops_share(torch.full((2, 12), 197.0), geometry).tolist() == pytest.approx([1.0, 1.0])


def test_formula_by_hand() -> None:
    """4 n C^2 + 2 n^2 C + 2 r n' C^2 with N = 10, C = 8, r = 4; 5 tokens after the first block, 2 after the second."""
    geometry = Geometry(tokens=10, width=8, mlp_ratio=(4.0, 4.0))
    full = 4 * 10 * 64 + 2 * 100 * 8 + 8 * 10 * 64
    first = 4 * 10 * 64 + 2 * 100 * 8 + 8 * 5 * 64
    second = 4 * 5 * 64 + 2 * 25 * 8 + 8 * 2 * 64
    share = flops_share(torch.tensor([5.0, 2.0]), geometry)
    assert share.item() == pytest.approx((first + second) / (2 * full), rel=1e-6)
    costs = block_costs(torch.tensor([10.0, 5.0]), torch.tensor([5.0, 2.0]), geometry) * 64
    assert costs.tolist() == pytest.approx([first, second])


def test_share_of_a_batch_is_the_mean_of_shares_not_the_share_of_the_mean() -> None:
    geometry = Geometry(tokens=100, width=16, mlp_ratio=(4.0, 4.0))
    kept = torch.tensor([[100.0, 100.0], [10.0, 10.0]])
    assert flops_share(kept, geometry).mean() != pytest.approx(flops_share(kept.mean(0), geometry).item(), abs=1e-3)


def test_share_is_differentiable_in_the_counts() -> None:
    kept = torch.full((1, 3), 50.0, requires_grad=True)
    flops_share(kept, Geometry(100, 16, (4.0,) * 3)).sum().backward()
    assert (kept.grad > 0).all()


def counted(model: Any, x: Tensor) -> int:
    """FLOPs that torch counts in the blocks: linear layers and attention, two per multiply-add."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run_blocks(model, x)
    return counter.get_total_flops()


@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
@pytest.mark.parametrize("kwargs", [{}, {"mlp_ratio": 2.0}, {"mlp_layer": SwiGLU}, {"depth": 6}], ids=str)
def test_share_is_what_torch_counts_on_the_packed_run(kwargs: dict[str, Any], variant: str) -> None:
    """Within 1 %: torch also counts the search for partners, a quarter of the pairs at the width of one head."""
    settings = {"img_size": 32, "embed_dim": 64, "num_heads": 4, **kwargs}
    model = tiny_vit(**settings)
    images = random_images(4, size=32)
    attach_reducing(model, images, variant, at=0.8)
    x = embed(model, images)
    # torch's counter does not count the fused attention of a CPU, and the host's own blocks would use it
    for block in attachment(model).body.blocks:
        block.attn.fused_attn = False
    with ltmp.dense():
        full = counted(model, x)
    for batch in (len(x), 1):
        with ltmp.record() as calls:
            packed = sum(counted(model, part) for part in x.split(batch))
        share = calls.share().mean().item()
        assert 0.2 < share < 0.9
        assert packed / full == pytest.approx(share, rel=0.01)
