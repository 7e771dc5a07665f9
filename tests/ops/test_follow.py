"""The kernels that follow patches and spread features against `method.tokens`."""

from __future__ import annotations

import pytest
import torch

from ltmp.method.tokens import follow as follow_reference
from ltmp.method.tokens import spread as spread_reference

from .helpers import DEVICE

triton = pytest.importorskip("triton")
# only now, as this imports Triton
from ltmp.ops.follow.triton import follow, spread  # noqa: E402

COUNTS = [[7], [1, 2], [70, 1, 130], [5, 200]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("branch", ["none", "added", "scaled"])
def test_follows_and_spreads_like_the_definition(counts: list[int], branch: str) -> None:
    generator = torch.Generator().manual_seed(len(counts))
    images, longest, patches, width, block = len(counts), max(counts), max(counts) + 9, 24, 3
    draw = torch.rand(images, longest, generator=generator)
    place = torch.arange(longest)
    there = place < torch.tensor(counts)[:, None]
    # some merge into a token that stays or is pruned, and some are pruned
    merges, prunes = (draw < 0.3) & (place % 2 == 0) & (place + 1 < torch.tensor(counts)[:, None]), draw > 0.6
    into = torch.where(merges, place + 1, place)
    live = there & ~merges & ~prunes
    order = (~live).int().argsort(dim=1, stable=True)
    moved = torch.empty_like(order).scatter(1, order, place.expand_as(order))
    slot = torch.where(merges, -2 - into, torch.where(live, moved, -1))
    source = torch.randint(-3, longest, (images, patches), generator=generator).int()
    source = source.where(source < torch.tensor(counts)[:, None], -1)
    expected = follow_reference(source, into, order, live.gather(1, order), block)

    cu = torch.tensor([0, *counts]).cumsum(0).int()
    x, y, scale = (torch.randn(*shape, generator=generator) for shape in ((sum(counts), width),) * 2 + ((width,),))
    before = torch.randn(images, patches, width, generator=generator)
    arguments = {"none": (None, None), "added": (y, None), "scaled": (y, scale)}[branch]
    attended = x + (0 if branch == "none" else y * (scale if branch == "scaled" else 1))
    gone = (source >= 0) & (expected < 0)
    kept = spread_reference(attended, cu[:-1].long(), source.where(gone, -1), before)

    packed = torch.cat([row[:n] for row, n in zip(slot.int(), counts, strict=True)])
    given = (t if t is None else t.to(DEVICE) for t in (x, *arguments))
    dropped = before.to(DEVICE)
    found = follow(source.to(DEVICE), packed.to(DEVICE), cu.to(DEVICE), block, *given, dropped)
    assert torch.equal(found.cpu(), expected)
    torch.testing.assert_close(dropped.cpu(), kept, atol=1e-6, rtol=1e-6)
    alone = follow(source.to(DEVICE), packed.to(DEVICE), cu.to(DEVICE), block, x.to(DEVICE))
    assert torch.equal(alone.cpu(), expected)

    grid = spread(x.to(DEVICE), cu.to(DEVICE), source.to(DEVICE), dropped)
    assert torch.equal(grid.cpu(), spread_reference(x, cu[:-1].long(), source, dropped.cpu()))


def test_an_image_that_its_room_cut_short_reads_no_other_memory() -> None:
    source = torch.tensor([[0, 1, 5, 900]], dtype=torch.int32, device=DEVICE)
    cu = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    slot = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    x = torch.randn(2, 16, device=DEVICE)
    assert follow(source, slot, cu, 0, x).tolist() == [[1, 0, 5, 900]]
    grid = spread(x, cu, source, torch.zeros(1, 4, 16, device=DEVICE))
    assert grid[0, :2].tolist() == x.tolist()
    assert not grid[0, 2:].any()
