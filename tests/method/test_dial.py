"""The budget dial: validation of its table, interpolation, and models that use it."""

from __future__ import annotations

import copy
import io
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltmp
from helpers import assert_close, attach_reducing, make_dial, random_images, run_recorded, tiny_vit
from ltmp import LTMPConfig, LTMPError
from ltmp.errors import UsageError
from ltmp.method.dial import Dial, keep_on
from ltmp.method.thresholds import Thresholds


def dialled(**kwargs: Any) -> Thresholds:
    thresholds = Thresholds(3, LTMPConfig())
    thresholds.set_dial(make_dial(3, **kwargs))
    return thresholds


def same(first: Dial | None, second: Dial | None) -> bool:
    assert first is not None
    assert second is not None
    pairs = zip(first.tensors().values(), second.tensors().values(), strict=True)
    return all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in pairs)


# -- the table


def test_knots_come_back_bit_for_bit() -> None:
    dial = make_dial(3)
    for row, share in enumerate(dial.share.tolist()):
        merge, prune = dial.at(share)
        assert torch.equal(merge, dial.merge[row])
        assert torch.equal(prune, dial.prune[row])
        assert torch.equal(dial.kept_at(share), dial.kept[row])


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_the_ends_are_reached_by_decimal_numbers(share: float) -> None:
    dial = make_dial(3, lowest=0.3, highest=0.95)
    assert (dial.lowest, dial.highest) == (0.3, 0.95)
    dial.at(share)


@given(st.floats(0.125, 0.4375, width=32), st.floats(0.5, 0.96875, width=32))
@settings(max_examples=60)
def test_lowest_and_highest_are_valid_budgets(lowest: float, highest: float) -> None:
    dial = make_dial(2, lowest=lowest, highest=highest)
    assert torch.equal(dial.at(dial.lowest)[0], dial.merge[0])
    assert torch.equal(dial.at(dial.highest)[0], dial.merge[-1])


@given(st.floats(0.3, 0.95), st.integers(0, 1000))
@settings(max_examples=60)
def test_values_are_interpolated_between_neighbours(share: float, seed: int) -> None:
    dial = make_dial(4, seed=seed, lowest=0.29, highest=0.96)
    merge, prune = dial.at(share)
    above = int((dial.share <= share).sum())
    below = above - 1
    part = (share - dial.share[below].item()) / (dial.share[above] - dial.share[below]).item()
    for found, table in ((merge, dial.merge), (prune, dial.prune), (dial.kept_at(share), dial.kept)):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.lerp(table[below], table[above], part), rtol=1e-5, atol=1e-7)


@given(st.floats(0.3, 0.95), st.integers(0, 1000))
@settings(max_examples=60)
def test_a_step_never_switches_inside_a_dial(share: float, seed: int) -> None:
    """However close to 1 a merge threshold is at the knots, and however close to 0 a prune threshold."""
    generator = torch.Generator().manual_seed(seed)
    rows, blocks = 5, 3
    merge = torch.where(torch.rand(rows, blocks, generator=generator) < 0.5, 1.0, 1 - 2**-24)
    prune = torch.where(torch.rand(rows, blocks, generator=generator) < 0.5, 0.0, 1e-30)
    merge, prune = keep_on(merge, prune)
    dial = Dial(torch.linspace(0.3, 0.95, rows), merge, prune, torch.ones(rows, blocks))
    thresholds = Thresholds(blocks, LTMPConfig())
    thresholds.set_dial(dial)
    active = set()
    for budget in (share, *dial.share.tolist()):
        thresholds.set_budget(budget)
        active.add(thresholds.active())
    assert len(active) == 1


def test_keep_on_changes_only_steps_that_switch() -> None:
    merge = torch.tensor([[0.5, 1.0, 1.0], [0.6, 0.9, 2.0]])
    prune = torch.tensor([[0.0, 0.0, 0.1], [0.0, 0.2, 0.2]])
    on_merge, on_prune = keep_on(merge, prune)
    assert on_merge.tolist() == [[0.5, pytest.approx(1 - 1e-6), 1.0], [pytest.approx(0.6), pytest.approx(0.9), 2.0]]
    assert (on_merge[:, 1] < 1).all()
    assert on_prune[:, 0].tolist() == [0.0, 0.0]
    assert (on_prune[:, 1] > 0).all()
    assert torch.equal(on_prune[:, 2], prune[:, 2])


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "one budget": ({"share": [0.5]}, "two budgets or more"),
    "shares in two rows": ({"share": [[0.3, 0.5, 0.7]]}, "two budgets or more"),
    "falling": ({"share": [0.5, 0.4, 0.7]}, "must rise between 0 and 1, got 0.5, 0.4, 0.7"),
    "twice the same": ({"share": [0.4, 0.4, 0.7]}, "must rise"),
    "up to one": ({"share": [0.4, 0.5, 1.0]}, "between 0 and 1"),
    "from zero": ({"share": [0.0, 0.5, 0.9]}, "between 0 and 1"),
    "NaN share": ({"share": [0.3, math.nan, 0.7]}, "share holds NaN"),
    "NaN": ({"prune": [[0.1, math.nan]] * 3}, "prune holds NaN"),
    "infinity": ({"merge": [[0.1, math.inf]] * 3}, "merge holds NaN or infinity"),
    "rows": ({"merge": [[0.5, 0.5]] * 2}, r"merge has shape \(2, 2\), expected one row for each of its 3 budgets"),
    "blocks": ({"kept": [[5.0]] * 3}, r"kept has shape \(3, 1\), .* each of its 2 blocks"),
    "flat": ({"merge": [0.5, 0.5, 0.5]}, r"must be \[budgets, blocks\]"),
    "nothing kept": ({"kept": [[5.0, 0.0]] * 3}, "kept tokens must be positive"),
    "merge switches": ({"merge": [[0.5, 0.5], [0.5, 0.5], [0.5, 1.0]]}, "merge step of block 1 is on at some"),
    "prune switches": ({"prune": [[0.1, 0.1], [0.1, 0.1], [0.0, 0.1]]}, "prune step of block 0 is on at some"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_refused_in_a_sentence(name: str) -> None:
    change, fragment = BROKEN[name]
    good: dict[str, Any] = {
        "share": [0.4, 0.5, 0.7], "merge": [[0.5, 0.5]] * 3, "prune": [[0.1, 0.1]] * 3, "kept": [[5.0, 4.0]] * 3
    }  # fmt: skip
    Dial(**{field: torch.tensor(values) for field, values in good.items()})
    with pytest.raises(ValueError, match=fragment) as refusal:
        Dial(**{field: torch.tensor(values) for field, values in {**good, **change}.items()})
    assert "\n" not in str(refusal.value)


def test_a_dial_keeps_its_own_copy() -> None:
    share = torch.tensor([0.4, 0.6], dtype=torch.float64)
    merge = torch.full((2, 1), 0.5, requires_grad=True)
    dial = Dial(share, merge, torch.full((2, 1), 0.1), torch.ones(2, 1))
    share.zero_()
    with torch.no_grad():
        merge.zero_()
    assert dial.at(0.5)[0].tolist() == [0.5]
    assert not dial.at(0.5)[0].requires_grad


# -- turning it


@pytest.mark.parametrize("share", [0.299, 0.951, 0.0, -1.0, 1.001, math.nan, math.inf])
def test_budgets_out_of_reach_are_refused_and_change_nothing(share: float) -> None:
    thresholds = dialled(lowest=0.3, highest=0.95)
    thresholds.set_budget(0.5)
    before = thresholds.merge.tolist()
    with pytest.raises(UsageError, match=r"this dial goes from 0\.3 to 0\.95, and 1 turns reduction off"):
        thresholds.set_budget(share)
    assert thresholds.merge.tolist() == before
    assert thresholds.budget == 0.5


def test_a_model_without_a_dial_is_refused_a_budget() -> None:
    with pytest.raises(LTMPError, match=r"no dial: make one with `ltmp dial` \(docs/dial\.md\)"):
        Thresholds(3, LTMPConfig()).set_budget(0.5)


def test_a_dial_of_another_depth_is_refused() -> None:
    thresholds = Thresholds(3, LTMPConfig())
    with pytest.raises(ValueError, match="a dial for 4 blocks, but this model has 3"):
        thresholds.set_dial(make_dial(4))
    assert thresholds.dial is None


def test_one_is_dense() -> None:
    thresholds = dialled()
    thresholds.set_budget(1.0)
    assert thresholds.active() == ((False, False),) * 3
    assert thresholds.budget == 1


def test_values_change_in_place() -> None:
    thresholds = dialled()
    before = [(parameter, parameter.data_ptr()) for parameter in thresholds.parameters()]
    thresholds.set_budget(0.5)
    for (old, address), new in zip(before, thresholds.parameters(), strict=True):
        assert old is new
        assert new.data_ptr() == address
    assert torch.equal(thresholds.merge, thresholds.dial.at(0.5)[0])  # type: ignore[union-attr]


def _train(thresholds: Thresholds) -> None:
    optimizer = torch.optim.SGD(thresholds.requires_grad_(True).parameters(), lr=0.1)
    thresholds.merge.sum().backward()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda thresholds: thresholds.set([0.5] * 3, None),
        lambda thresholds: thresholds.load_state_dict(Thresholds(3, LTMPConfig()).state_dict()),
        lambda thresholds: thresholds.set_dial(make_dial(3, seed=9)),
        lambda thresholds: thresholds.set_dial(None),
        lambda thresholds: thresholds.merge.data.mul_(0.5),
        _train,
    ],
    ids=["set", "load_state_dict", "another dial", "no dial", "by hand", "training"],
)
def test_budget_is_none_after_thresholds_changed(change: Any) -> None:
    thresholds = dialled()
    assert thresholds.budget is None
    thresholds.set_budget(0.55)
    assert thresholds.budget == 0.55
    change(thresholds)
    assert thresholds.budget is None


@torch.no_grad()
def test_the_same_numbers_mean_the_same_from_a_dial_and_from_set() -> None:
    images = random_images(4)
    model = attach_reducing(tiny_vit(), images)
    merge, prune = model.ltmp.merge.detach().clone(), model.ltmp.prune.detach().clone()
    merge_table, prune_table = torch.stack([merge, torch.ones(3)]), torch.stack([prune, torch.zeros(3)])
    table = keep_on(merge_table, prune_table)
    model.ltmp.set_dial(Dial(torch.tensor([0.5, 0.9]), *table, torch.ones(2, 3)))
    plain = copy.deepcopy(model)
    plain.ltmp.set_dial(None)
    for share in (0.5, 0.7, 0.9):
        model.ltmp.set_budget(share)
        plain.ltmp.set(model.ltmp.merge, model.ltmp.prune)
        (logits, kept), (expected, counts) = run_recorded(model, images), run_recorded(plain, images)
        assert torch.equal(kept, counts)
        assert torch.equal(logits, expected)


@torch.no_grad()
def test_steps_that_are_on_and_select_nothing_lose_nothing_on_any_engine() -> None:
    """A step that `keep_on` turned on reorders the tokens, but no engine removes or merges one."""
    pytest.importorskip("triton")
    images = random_images(3)
    model = ltmp.attach(tiny_vit())
    with ltmp.dense():
        expected = model(images)
    model.ltmp.set(*(row[1] for row in keep_on(*(torch.tensor(t) for t in _one_off()))))
    assert model.ltmp.active() == ((True, True),) * 3
    for engine, masked in (("packed", True), ("packed", False), ("triton", False)):
        model.ltmp.config = replace(model.ltmp.config, engine=engine)
        model.ltmp.train(masked).requires_grad_(masked)
        logits, kept = run_recorded(model, images)
        assert kept.eq(17).all()
        assert_close(logits, expected, 1e-4, f"logits ({engine}, masked: {masked})")


def _one_off() -> tuple[list[list[float]], list[list[float]]]:
    """Merge and prune thresholds at two budgets, all off at the second."""
    return [[0.5] * 3, [1.0] * 3], [[0.1] * 3, [0.0] * 3]


# -- keeping it


def via_deepcopy(model: Any) -> Any:
    return copy.deepcopy(model)


def via_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def via_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def via_cast(model: Any) -> Any:
    return model.half().to("cpu").bfloat16().float()


@pytest.mark.parametrize("way", [via_deepcopy, via_pickle, via_torch_save, via_cast])
def test_copies_keep_dial_and_budget_bit_for_bit(way: Any) -> None:
    model = ltmp.attach(tiny_vit())
    dial = make_dial(3)
    model.ltmp.set_dial(dial)
    model.ltmp.set_budget(0.61)
    twin = way(model)
    assert same(twin.ltmp.dial, dial)
    assert twin.ltmp.budget == 0.61
    twin.ltmp.set_budget(0.5)
    assert torch.equal(twin.ltmp.merge, dial.at(0.5)[0])


def test_state_dict_holds_the_dial() -> None:
    model, other = (ltmp.attach(tiny_vit()) for _ in range(2))
    model.ltmp.set_dial(make_dial(3))
    model.ltmp.set_budget(0.61)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(other.ltmp.dial, model.ltmp.dial)
    assert torch.equal(other.ltmp.merge, model.ltmp.merge)
    # what was loaded may be anything
    assert other.ltmp.budget is None


def test_checkpoints_without_a_dial_still_load() -> None:
    plain, model = (ltmp.attach(tiny_vit()) for _ in range(2))
    plain.ltmp.set([0.5] * 3, [0.1] * 3)
    assert not any("dial" in name for name in plain.state_dict())
    model.ltmp.set_dial(make_dial(3))
    model.load_state_dict(plain.state_dict())
    assert model.ltmp.dial is None
    model.ltmp.set_dial(make_dial(3))
    # a checkpoint of the host alone leaves thresholds and dial as they are
    model.load_state_dict(tiny_vit().state_dict(), strict=False)
    assert model.ltmp.dial is not None


def test_a_broken_dial_in_a_state_dict_is_refused() -> None:
    model = ltmp.attach(tiny_vit())
    model.ltmp.set_dial(make_dial(3))
    state = model.state_dict()
    state["ltmp.dial.share"] = -state["ltmp.dial.share"]
    with pytest.raises(RuntimeError, match="shares must rise"):
        model.load_state_dict(state)


def test_named_tensors_are_found_again() -> None:
    dial = make_dial(3)
    tensors: dict[str, Tensor] = {**dial.tensors(), "merge": torch.ones(3)}
    assert same(Dial.find(tensors), dial)
    assert Dial.find({"merge": torch.ones(3)}) is None
    del tensors["dial.kept"]
    with pytest.raises(ValueError, match=r"a dial without dial\.kept"):
        Dial.find(tensors)


def test_training_reads_what_the_dial_set() -> None:
    """A model in train mode with a budget set: thresholds still learn."""
    images = random_images(2)
    model = ltmp.attach(tiny_vit())
    model.ltmp.set_dial(make_dial(3))
    model.ltmp.set_budget(0.6)
    model.ltmp.config = replace(model.ltmp.config, tau=0.2)
    model.requires_grad_(False)
    model.ltmp.requires_grad_(True).train()
    model(images).sum().backward()
    assert model.ltmp.merge.grad is not None
