"""Fixed-rate methods: they equal a short independent implementation in every engine; invalid settings are refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fixed_rate
import ltmp
from helpers import assert_close, attach_reducing, embed, random_images, run_recorded, tiny_vit
from ltmp.config import FIXED, LTMPConfig
from ltmp.errors import LTMPError
from ltmp.hosts.attach import attachment, thresholds_of
from ltmp.method.rates import noise, spread

DEPTH = 3
HOSTS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 4},
    "mean pooled": {"class_token": False, "global_pool": "avg"},
    "layer scale, qk norm": {"init_values": 0.1, "qk_norm": True},
}
RATES: dict[str, dict[str, Any]] = {
    "constant": {"r": 2},
    "more than there are": {"r": 9},
    "a part": {"r": 0.3},
    "a list": {"r": [0, 5, 1]},
    "falling": {"r": 2, "schedule": "decreasing"},
}


def attached(variant: str, host: str = "class token", **rates: Any) -> Any:
    return ltmp.attach(tiny_vit(**HOSTS[host]), LTMPConfig(variant=variant, **rates))


def expected(model: Any, images: Tensor, variant: str, **rates: Any) -> tuple[Tensor, list[list[int]]]:
    config = LTMPConfig(variant=variant, **rates)
    prune = config.r if config.r_prune is None else config.r_prune
    schedules = [list(spread(r, DEPTH, config.schedule)) for r in (config.r, prune)]
    scores = (lambda i, where: noise(torch.tensor(where), i, config.seed)) if variant == "random" else None
    found = [fixed_rate.run(model, x, variant, *schedules, scores) for x in embed(model, images)]
    return torch.stack([logits for logits, _ in found]), [counts for _, counts in found]


CASES = [
    (variant, host, rates)
    for variant in FIXED
    for host in HOSTS
    for rates in RATES
    if not (host == "mean pooled" and variant in ("topk", "evit"))
]


@pytest.mark.parametrize(("variant", "host", "rates"), CASES)
@torch.no_grad()
def test_equals_the_independent_implementation(variant: str, host: str, rates: str) -> None:
    images = random_images(3)
    logits, counts = expected(tiny_vit(**HOSTS[host]), images, variant, **RATES[rates])
    model = attached(variant, host, **RATES[rates])
    assert min(map(min, counts)) < counts[0][0] + 2, "nothing is removed: the test tests little"
    for mode in ("packed", "masked"):
        model.ltmp.train(mode == "masked").requires_grad_(mode == "masked")
        found, kept = run_recorded(model, images)
        assert kept.tolist() == counts, mode
        assert_close(found, logits, 1e-5, f"{mode} logits")


@pytest.mark.parametrize("variant", ["mp", "pm"])
@torch.no_grad()
def test_steps_may_have_separate_rates(variant: str) -> None:
    images, rates = random_images(2), {"r": 3, "r_prune": (0, 2, 1)}
    logits, counts = expected(tiny_vit(), images, variant, **rates)
    found, kept = run_recorded(attached(variant, **rates), images)
    assert kept.tolist() == counts
    assert counts[0] == [14, 9, 5]
    assert_close(found, logits, 1e-5)


@settings(max_examples=30)
@given(
    variant=st.sampled_from(FIXED),
    r=st.one_of(st.integers(0, 12), st.floats(0, 0.9), st.lists(st.integers(0, 9), min_size=DEPTH, max_size=DEPTH)),
    size=st.sampled_from([4, 8, 12, 20]),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_masked_packed_and_single_images_agree(variant: str, r: Any, size: int, batch: int, seed: int) -> None:
    model = ltmp.attach(tiny_vit(img_size=size, seed=seed), LTMPConfig(variant=variant, r=r, seed=seed))
    images = random_images(batch, size=size, seed=seed)
    packed, kept = run_recorded(model, images)
    single = [run_recorded(model, image[None]) for image in images]
    model.ltmp.train().requires_grad_()
    masked, kept_masked = run_recorded(model, images)
    assert kept.tolist() == kept_masked.tolist() == torch.cat([k for _, k in single]).tolist()
    assert_close(masked, packed, 1e-5)
    assert_close(torch.cat([logits for logits, _ in single]), packed, 1e-5)


@torch.no_grad()
def test_no_rate_is_dense() -> None:
    images = random_images(2)
    for variant in FIXED:
        assert_close(attached(variant)(images), tiny_vit()(images), 0)


@torch.no_grad()
def test_timm_names_take_rates() -> None:
    for variant in FIXED:
        model = timm.create_model(f"{variant}_test_vit", r=8).eval()
        assert model.ltmp.config == LTMPConfig(variant=variant, r=8)
        assert list(model.ltmp.parameters()) == []
    model = timm.create_model("m_test_vit", r=[1, 2, 3, 4, 5, 6]).eval()
    _, kept = run_recorded(model, random_images(1, size=160))
    assert kept[0].diff().tolist() == [-2, -3, -4, -5, -6]
    assert not timm.is_model("inference_m_test_vit")


@pytest.mark.parametrize("variant", FIXED)
@torch.no_grad()
def test_saves_loads_copies_and_detaches(variant: str, tmp_path: Any) -> None:
    images = random_images(2)
    model = attached(variant, r=(1, 2, 3), seed=4)
    logits = model(images)
    ltmp.save(model, tmp_path / "fixed.safetensors")
    again = tiny_vit()
    file = ltmp.load(again, tmp_path / "fixed.safetensors")
    assert file.config == again.ltmp.config == LTMPConfig(variant=variant, r=(1, 2, 3), seed=4)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_close(other(images), logits, 0)
    assert_close(ltmp.detach(model)(images), tiny_vit()(images), 0)


def test_saved_rates_are_refused_by_a_model_with_other_settings(tmp_path: Any) -> None:
    ltmp.save(attached("m", r=2), tmp_path / "fixed.safetensors")
    with pytest.raises(LTMPError, match="variant m, but the model was attached as ltmp"):
        ltmp.load(ltmp.attach(tiny_vit()), tmp_path / "fixed.safetensors")
    with pytest.raises(LTMPError, match=r"r=2.*attached with r=3"):
        ltmp.load(attached("m", r=3), tmp_path / "fixed.safetensors")


def test_random_follows_its_seed() -> None:
    places = torch.arange(1000)
    assert torch.equal(noise(places, 1, 7), noise(places, 1, 7))
    numbers = torch.stack([noise(places, block, seed) for block in range(2) for seed in range(2)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(1) - 0.5).abs().max() < 0.04
    assert numbers.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_falling_rates() -> None:
    assert spread(8, 5, "decreasing") == (16, 12, 8, 4, 0)
    assert spread(3, 1, "decreasing") == (3,)


@pytest.mark.parametrize(
    ("kwargs", "fragment"),
    [
        ({"variant": "m", "r": -1}, "number of tokens"),
        ({"variant": "m", "r": 1.5}, "fraction below 1"),
        ({"variant": "m", "r": True}, "got True"),
        ({"variant": "ltmp", "r": 3}, "ltmp learns its thresholds"),
        ({"variant": "m", "r": (1, 2), "schedule": "decreasing"}, "a rate for each block"),
        ({"variant": "m", "r": 1, "r_prune": 2}, "r_prune is for mp and pm"),
        ({"schedule": "falling"}, "expected one of constant, decreasing"),
        ({"floor": 9, "ceiling": 5}, "0 <= floor <= ceiling"),
        ({"floor": -1}, "0 <= floor <= ceiling"),
    ],
)
def test_bad_settings_say_what_is_wrong(kwargs: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        LTMPConfig(**kwargs)


def test_bad_attachments_say_what_is_wrong() -> None:
    with pytest.raises(LTMPError, match="rates for 2 blocks, but this model has 3"):
        attached("m", r=(1, 2))
    with pytest.raises(LTMPError, match="topk needs a class token's attention, and this model has no class token"):
        attached("topk", "mean pooled", r=1)
    with pytest.raises(LTMPError, match="fixed rates, not thresholds"):
        thresholds_of(attached("m", r=1))
    with pytest.raises(LTMPError, match="fixed rates, not thresholds"):
        ltmp.learn(attached("m", r=1), [(random_images(2), torch.zeros(2).long())], target=0.8)


@pytest.mark.parametrize("variant", ["ltmp", "ltpm", "ltm", "ltp"])
@torch.no_grad()
def test_floor_and_ceiling_hold_for_every_image(variant: str) -> None:
    images = random_images(6)
    model = attach_reducing(tiny_vit(), images, variant, at=0.6)
    free = run_recorded(model, images)[1]
    low, high = int(free.min()) + 2, int(free[:, 0].max()) - 2
    assert low < high
    for mode in ("packed", "masked"):
        model.ltmp.train(mode == "masked").requires_grad_(mode == "masked")
        model.ltmp.config = LTMPConfig(variant=variant, floor=low, ceiling=high)
        kept = run_recorded(model, images)[1]
        assert kept.min() >= low
        # although merging alone removes at most half of the tokens
        assert kept.max() <= high
        model.ltmp.config = LTMPConfig(variant=variant)


@torch.no_grad()
def test_floor_and_ceiling_that_do_not_bind_change_nothing() -> None:
    images = random_images(4)
    model = attach_reducing(tiny_vit(), images)
    logits, kept = run_recorded(model, images)
    model.ltmp.config = LTMPConfig(floor=1, ceiling=17)
    bounded, kept_bounded = run_recorded(model, images)
    assert kept.tolist() == kept_bounded.tolist()
    assert_close(bounded, logits, 0)


def test_a_ceiling_needs_no_threshold_and_keeps_gradients() -> None:
    images = random_images(3)
    model = ltmp.attach(tiny_vit(), LTMPConfig(ceiling=9))
    assert run_recorded(model, images)[1].max() <= 9
    model.ltmp.set(prune=[0.05] * DEPTH)
    model.ltmp.train().requires_grad_()
    with ltmp.record() as calls:
        model(images).square().sum().backward(retain_graph=True)
    assert model.ltmp.prune.grad.abs().sum() > 0
    assert calls.kept[0].max() <= 9
    assert attachment(model).policy.bounded
