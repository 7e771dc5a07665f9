"""The Triton engine agrees with the packed torch engine: equal counts, and logits up to rounding."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor

import ltmp
from helpers import (
    assert_close,
    attach_reducing,
    embed,
    make_probe,
    plain_torch,
    random_images,
    run_blocks,
    tiny_vit,
)
from ltmp.config import FIXED, SCORES, LTMPConfig, Scores
from ltmp.engines import packed
from ltmp.engines.body import running
from ltmp.engines.state import Reduced
from ltmp.hosts.attach import attachment

pytest.importorskip("triton")
from ltmp.engines import triton as engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

HOSTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias, five prefix tokens": {"qkv_bias": False, "reg_tokens": 4},
    "no prefix, mean pooled": {"class_token": False, "global_pool": "avg"},
    "layer scale": {"init_values": 0.1},
    "qk norm": {"qk_norm": True},
    "distilled": {"cls": VisionTransformerDistilled},
    "tanh": {"act_layer": "gelu_tanh"},
    "own modules": {"norm_layer": "rmsnorm"},
    "head of 24": {"embed_dim": 48},
}


def both(model: Any, images: Tensor, **kwargs: Any) -> tuple[Reduced, Reduced]:
    model, images = model.to(DEVICE), images.to(DEVICE)
    body, x = attachment(model).body, embed(model, images)
    active = body.active()
    with torch.no_grad():
        return packed.run(body, x, active), engine.Pass(body, x, active, **kwargs).run()


def assert_same(expected: Reduced, found: Reduced, atol: float = 1e-4) -> None:
    assert found.kept.tolist() == expected.kept.tolist()
    longest = expected.size.shape[1]
    assert_close(found.size[:, :longest], expected.size, 0)
    assert not found.size[:, longest:].any()
    assert_close(found.x[:, :longest], expected.x, atol)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter launches")
def test_a_grid_takes_one_more_launch_per_block_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import GridExecutor

    launched: list[str] = []
    launch = GridExecutor.__call__

    def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(kernel.fn.__name__)
        return launch(kernel, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images).requires_grad_(False)
    model.ltmp.config = replace(model.ltmp.config, engine="triton")
    with torch.no_grad():
        model(images)
        reduced = Counter(launched)
        launched.clear()
        with ltmp.unmerge():
            model(images)
    assert Counter(launched) == reduced + Counter(_follow_kernel=model.ltmp.depth, _spread_kernel=1)


@pytest.mark.parametrize(
    ("host", "variant"),
    [*((host, "ltmp") for host in HOSTS), *((host, v) for host in list(HOSTS)[:3] for v in ("ltpm", "ltm", "ltp"))],
)
def test_agrees_with_packed(host: str, variant: str) -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(**HOSTS[host]), images, variant)
    expected, found = both(model, images)
    assert expected.kept.std(0).max() > 0, "all images alike: the test tests little"
    assert_same(expected, found)


@pytest.mark.parametrize("idle", [(1,), (0, 2)], ids=str)
@pytest.mark.parametrize("host", list(HOSTS)[:4])
def test_blocks_that_remove_nothing(host: str, idle: tuple[int, ...]) -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(**HOSTS[host]), images)
    model.ltmp.merge[list(idle)], model.ltmp.prune[list(idle)] = 1.0, 0.0
    expected, found = both(model, images)
    kept = torch.cat([torch.full((3, 1), float(model.pos_embed.shape[1])), expected.kept], 1).diff()
    assert (kept == 0).all(0).nonzero()[:, 0].tolist() == list(idle)
    assert_same(expected, found)


@pytest.mark.parametrize("variant", ["ltmp", "ltpm"])
def test_capacity_gives_the_same(variant: str) -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(), images, variant)
    expected, _ = both(model, images)
    room = tuple(int(n) + 7 for n in expected.kept.sum(0))
    longest = tuple(int(n) + 2 for n in expected.kept.amax(0))
    expected, found = both(model, images, capacity=engine.Capacity(room, longest))
    assert_same(expected, found)


def traced_outputs(model: Any, images: Tensor, name: str, engine: Any = None) -> tuple[Tensor, ...]:
    """Return grid, counts, sources of the grid and of reduced rows, and both after each block."""
    model.ltmp.config = replace(model.ltmp.config, engine=name)
    override = nullcontext() if engine is None else running(engine)
    with torch.no_grad(), override, ltmp.record() as calls, ltmp.trace(every_block=True) as traced:
        x = embed(model, images)
        with ltmp.unmerge():
            grid = run_blocks(model, x)
        run_blocks(model, x)
    assert len(traced.sources) == 2
    return grid, calls.kept[0], *traced.sources, *traced.blocks


def assert_same_traces(expected: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    assert_close(found[0], expected[0], 1e-4)
    assert (expected[2] < 0).any() or expected[1].shape[1] == 0, "nothing is pruned: the test checks little"
    for a, b in zip(expected[1:], found[1:], strict=True):
        assert torch.equal(a, b)


TRACED: dict[str, dict[str, Any]] = {
    "floor": {"floor": 8}, "fixed": {"variant": "pm", "r": (0, 4, 2)}, "mutual": {"scores": Scores(matching="mutual")},
}  # fmt: skip


@pytest.mark.parametrize(
    ("host", "settings"),
    [*((host, {}) for host in list(HOSTS)[:4]),
     *zip([*HOSTS][:4] * 2, [{"variant": "ltpm"}, {"variant": "ltp"}, *TRACED.values()], strict=False)],
    ids=str,
)  # fmt: skip
def test_patches_are_traced_as_by_packed(host: str, settings: dict[str, Any]) -> None:
    """Grids, sources and trails, at exact and at fixed sizes."""
    images = random_images(3).to(DEVICE)
    model, config = tiny_vit(**HOSTS[host]), LTMPConfig(**settings)
    if config.method.fixed:
        ltmp.attach(model, config)
    else:
        attach_reducing(model, images.cpu(), config.variant)
        model.ltmp.config = config
    model.to(DEVICE)
    with plain_torch():
        expected = traced_outputs(model, images, "packed")
    assert_same_traces(expected, traced_outputs(model, images, "triton"))
    counts = expected[1].T
    room = engine.Capacity(tuple(int(n) + 5 for n in counts.sum(1)), tuple(int(n) + 1 for n in counts.amax(1)))
    active = attachment(model).body.active()
    if active == attachment(model).body.keep_last_patches(active):
        assert_same_traces(expected, traced_outputs(model, images, "triton", engine.CountingEngine(active, room)))


def test_fused_tokens_are_traced_as_by_packed() -> None:
    images = random_images(3).to(DEVICE)
    model = ltmp.attach(tiny_vit(), LTMPConfig("evit", r=4)).to(DEVICE)
    expected, found = traced_outputs(model, images, "packed"), traced_outputs(model, images, "triton")
    assert_close(found[0], expected[0], 1e-4)
    assert all(torch.equal(a, b) for a, b in zip(expected[1:], found[1:], strict=True))


def test_blocks_that_are_off() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(depth=5), images)
    merge, prune = model.ltmp.merge.tolist(), model.ltmp.prune.tolist()
    model.ltmp.set([1, merge[1], 1, merge[3], merge[4]], [0, prune[1], 0, 0, prune[4]])
    assert_same(*both(model, images))


@pytest.mark.parametrize("images", [1, 2, 5])
def test_any_batch(images: int) -> None:
    model = attach_reducing(tiny_vit(), random_images(4))
    assert_same(*both(model, random_images(images, seed=3)))


POLICIES: dict[str, dict[str, Any]] = {
    **{variant: {"variant": variant, "r": 3} for variant in FIXED},
    "parts": {"variant": "mp", "r": 0.2},
    "a list": {"variant": "pm", "r": (0, 4, 2)},
    "floor and ceiling": {"floor": 8, "ceiling": 10},
    "ceiling after pruning": {"variant": "ltpm", "ceiling": 12},
    "cosines of all heads": {"scores": Scores("heads")},
    "cosines of all heads after pruning": {"variant": "ltpm", "scores": Scores("heads")},
    "mutual pairs": {"scores": Scores(matching="mutual")},
    "mutual pairs after pruning": {"variant": "ltpm", "scores": Scores(matching="mutual")},
    "sizes by half": {"scores": Scores(size_power=0.5)},
    "class-token attention": {"scores": Scores(class_power=0.5)},
    "class-token attention after pruning": {"variant": "ltpm", "scores": Scores(class_power=0.5)},
    "class-token attention in pruning alone": {"variant": "ltp", "scores": Scores(class_power=0.5)},
    "class-token attention at fixed rates": {"variant": "mp", "r": 2, "scores": Scores(class_power=0.5)},
    "all that needs no probe": {"scores": "attention"},
    "all that needs no probe after pruning": {"variant": "ltpm", "scores": "attention"},
    "a probe's similarity": {"scores": Scores("probe")},
    "a probe's importance": {"scores": Scores(importance="probe", class_power=0.5)},
    "a probe and class-token attention": {"scores": replace(SCORES["best"], class_power=0.5)},
    "the best scores": {"scores": "best"},
    "the best scores after pruning": {"variant": "ltpm", "scores": "best"},
    "the best scores with a floor": {"floor": 8, "scores": "best"},
    "all settings changed": {"scores": Scores("probe", "mutual", "probe", size_power=0.3, class_power=0.5)},
}


@pytest.mark.parametrize("host", ["plain", "no bias, five prefix tokens", "no prefix, mean pooled", "own modules"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_agrees_with_packed(policy: str, host: str) -> None:
    config = LTMPConfig(**POLICIES[policy])
    if config.needs_class_attention and host == "no prefix, mean pooled":
        pytest.skip("this variant needs a class token, and this host has none")
    images = random_images(3)
    model = tiny_vit(**HOSTS[host])
    if config.method.fixed:
        ltmp.attach(model, config)
    else:
        attach_reducing(model, images, config.variant)
        model.ltmp.config = config
    if config.needs_probe:
        model.ltmp.set_probe(make_probe(model.ltmp.depth))
    expected, found = both(model, images)
    assert expected.kept[:, -1].max() < expected.kept[:, 0].max(), "nothing goes: the test tests little"
    assert_same(expected, found)
    # at fixed sizes, with nothing read back
    counts = expected.kept.T
    room = tuple(int(n) + 5 for n in counts.sum(1))
    exact = engine.Capacity(room, tuple(int(n) + 1 for n in counts.amax(1)))
    assert_same(expected, both(model, images, capacity=exact)[1])
