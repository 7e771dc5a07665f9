"""Methods compared on equal terms: rates that meet a budget, one pass over the data, one table and one plot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ltmp
from helpers import random_images, tiny_vit
from ltmp.calls import record
from ltmp.config import FIXED
from ltmp.engines.body import running
from ltmp.errors import UsageError
from ltmp.evaluate import evaluate
from ltmp.evaluate.compare import Entry, RequestedMethod, compare, fixed_entry, rates_for, rows
from ltmp.hosts.attach import attachment


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = random_images(12)
    return list(zip(images.split(5), (torch.arange(12) % 5).split(5), strict=True))


@pytest.mark.parametrize("variant", FIXED)
def test_rates_are_as_close_to_a_budget_as_possible(variant: str) -> None:
    model, images = ltmp.attach(tiny_vit(depth=6)), random_images(1)
    for target in (0.9, 0.7):
        policy = rates_for(model, images, variant, target)
        with record() as calls, running(body=replace(attachment(model).body, policy=policy)):
            model(images)
        # within one of 17 tokens per step
        assert abs(calls.share().item() - target) < 0.02 * len(policy.config.steps)
        assert max(policy.rates["merge"]) - min(policy.rates["merge"]) <= 1


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(UsageError, match=r"method m cannot go below a share of 0\.\d\d"):
        rates_for(ltmp.attach(tiny_vit()), random_images(1), "m", 0.2)


def test_one_pass_equals_single_evaluations() -> None:
    model = ltmp.attach(tiny_vit())
    entries = [
        fixed_entry(model, RequestedMethod.parse(text), random_images(1), 0.7) for text in ("m:3", "p:2", "topk", "mp")
    ]
    results = compare(model, batches(), entries, speed=False)
    for entry in entries:
        single = ltmp.attach(tiny_vit(), entry.policy.config)
        assert evaluate(single, batches(), speed=False) == results[entry.name]
    table = rows(entries, results)
    assert [row["name"] for row in table] == ["dense", "m:3", "p:2", "topk 0.7", "mp 0.7"]
    assert table[0]["share"] == 1
    assert [row["target"] for row in table] == [None, None, None, 0.7, 0.7]


def test_learned_thresholds_take_part_and_stay_as_they_are() -> None:
    model = ltmp.attach(tiny_vit())
    model.ltmp.set([0.5] * 3, [0.04] * 3)
    mine = attachment(model).policy
    entries = [Entry("mine", "ltmp", None, mine), fixed_entry(model, RequestedMethod("m", 4), random_images(1), None)]
    results = compare(model, batches(), entries)
    assert attachment(model).policy is mine
    assert results["mine"].share < 1
    assert results["mine"] != results["m:4"]
    assert results["m:4"].throughput is not None


@pytest.mark.parametrize("text", ["tome", "m:x", "m:-1", "m:1.5", "ltmp:3"])
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"no method|method "):
        RequestedMethod.parse(text)


@pytest.mark.parametrize("registers", [0, 2])
def test_methods_that_need_a_class_token_say_so(registers: int) -> None:
    model = ltmp.attach(tiny_vit(class_token=False, reg_tokens=registers, global_pool="avg"))
    with pytest.raises(UsageError, match="this model has no class token"):
        fixed_entry(model, RequestedMethod("evit", 1), random_images(1), None)
