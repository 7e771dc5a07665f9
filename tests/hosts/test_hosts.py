"""Every kind of host (`cases.py`) against every behaviour of an attached model."""

from __future__ import annotations

import copy
import io
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ATTACHED, REFUSED, Case
from torch import Tensor, nn

import ltmp
from helpers import assert_close
from ltmp.config import Scores
from ltmp.engines.body import running
from ltmp.engines.capacity import Capacity
from ltmp.hosts.attach import attachment
from ltmp.learning import learn_probe
from ltmp.visualize import see

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=ATTACHED)
def case(request: pytest.FixtureRequest) -> Case:
    return ATTACHED[request.param]


def attached(case: Case, seed: int = 0, model: Any = None) -> Any:
    """The host with random thresholds, in the range where they remove some of the tokens."""
    model = ltmp.attach(case.build() if model is None else model)
    depth = model.ltmp.depth
    draw = torch.rand(2, depth, generator=torch.Generator().manual_seed(seed))
    model.ltmp.set(0.4 + 0.4 * draw[0], (0.3 + 0.5 * draw[1]) / case.tokens)
    return model


def recorded(case: Case, model: Any) -> tuple[Tensor, Tensor]:
    """The output and tokens after each block [B, L]."""
    with ltmp.record() as calls:
        output = case.call(model)
    return output, torch.cat(calls.kept)


@torch.no_grad()
def test_off_thresholds_give_the_dense_output(case: Case) -> None:
    model = case.build()
    dense = case.call(model)
    assert not torch.equal(dense[0], dense[1]), "the images are all the same to this model: the test tests little"
    ltmp.attach(model)
    assert_close(case.call(model), dense, atol=1e-5, what="packed")
    model.ltmp.train().requires_grad_()
    assert_close(case.call(model), dense, atol=1e-5, what="masked")


def test_scores_by_the_class_token_need_one(case: Case) -> None:
    model = case.build()
    named = [name for name, _ in model.named_parameters() if re.search(r"(cls|class)_(token|embed)", name)]
    config = ltmp.LTMPConfig(scores=Scores(class_power=0.5))
    if named:
        assert attachment(ltmp.attach(model, config)).body.protected > 0
    else:
        with pytest.raises(ltmp.LTMPError, match="needs a class token's attention, and this model has no class token"):
            ltmp.attach(model, config)


class Answers(torch.nn.Module):
    """The case's output to images alone, as logits."""

    def __init__(self, case: Case, model: Any) -> None:
        super().__init__()
        self.case, self.model = case, model

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.case.inputs(self.model)
        if isinstance(inputs, dict):
            first = next(iter(inputs))
            return self.case.output(self.model(**{**inputs, first: images})).flatten(1)
        return self.case.output(self.model(images, *inputs[1:])).flatten(1)


def test_probes_are_learned_of_every_host(case: Case) -> None:
    """Gradients flow through each host's own blocks; learned probes decide the same in training and when deployed."""
    model = attached(case, model=ltmp.attach(case.build(), ltmp.LTMPConfig()))
    inputs = case.inputs(model)
    images = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0]
    model.ltmp.config = replace(model.ltmp.config, scores=Scores("probe", "mutual", "probe"))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert learn_probe(Answers(case, model), images) == len(images)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert all(p.grad is None for p in model.parameters())
    assert model.ltmp.probe.isfinite().all()
    assert model.ltmp.probe.square().mean((1, 2)).min() > 0
    # distances between lifted tokens are small against those of random thresholds
    model.ltmp.set(model.ltmp.merge - 0.5)
    with torch.no_grad():
        packed, kept = recorded(case, model)
        assert kept[:, -1].lt(case.tokens).all()
        model.ltmp.train().requires_grad_()
        masked, same = recorded(case, model)
    assert same.tolist() == kept.tolist()
    assert_close(masked, packed, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1])
def test_masked_is_packed(case: Case, seed: int) -> None:
    model = attached(case, seed)
    packed, kept = recorded(case, model)
    assert kept[:, -1].lt(case.tokens).all()
    assert kept[:, 0].gt(1).any()
    model.ltmp.train().requires_grad_()
    masked, same = recorded(case, model)
    assert same.tolist() == kept.tolist()
    assert_close(masked, packed, atol=1e-5)
    with ltmp.dense():
        assert not torch.allclose(case.call(model), packed, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fixed"),
    [("eva", False), ("dinov3", True), ("rope-mixed", True), ("torchvision", False), ("open-clip-quick", False)],
)
def test_triton_is_packed(name: str, fixed: bool) -> None:
    """The kernels, with exact shapes and with the fixed shapes of a CUDA graph, whose spare rows hold any values."""
    pytest.importorskip("triton")
    from ltmp.engines.triton import CountingEngine

    case = ATTACHED[name]
    model = attached(case)
    packed, kept = recorded(case, model)
    rows, longest = kept.sum(0).int() + 5, kept.amax(0).int() + 1
    engine = CountingEngine(capacity=Capacity(tuple(rows.tolist()), tuple(longest.tolist())) if fixed else None)
    with running(engine):
        output, same = recorded(case, model)
    assert engine.stats is not None, "another engine ran"
    assert same.tolist() == kept.tolist()
    assert_close(output, packed, atol=1e-4)


@torch.no_grad()
def test_detach_restores_bit_for_bit(case: Case) -> None:
    model = case.build()
    before = {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    dense = case.call(model)
    attached(case, model=model)
    assert sorted(model.state_dict()) == sorted([*state, "ltmp.merge", "ltmp.prune"])
    assert not torch.equal(case.call(model), dense)
    ltmp.detach(model)
    assert before == {name: (id(module), sorted(vars(module))) for name, module in model.named_modules()}
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(case.call(model), dense)


@torch.no_grad()
def test_unmerged_features_cover_every_patch(case: Case) -> None:
    """Off thresholds change nothing; the head of a reduced model sees every patch, packed as masked."""
    model = case.build()
    dense = case.call(model)
    ltmp.attach(model)
    with ltmp.unmerge():
        assert_close(case.call(model), dense, atol=1e-5)
    model = attached(case)
    _, kept = recorded(case, model)
    with ltmp.unmerge(), ltmp.trace() as calls:
        packed, same = recorded(case, model)
        model.ltmp.train().requires_grad_()
        masked, _ = recorded(case, model)
    assert same.tolist() == kept.tolist()
    assert_close(masked, packed, atol=1e-5)
    assert all(source.shape[1] == case.tokens for source in calls.sources)
    model.ltmp.eval()
    with ltmp.trace() as calls:
        case.call(model)
    (source,) = calls.sources
    # as many tokens left as there are different places that patches ended in
    assert [len(row[row >= 0].unique()) for row in source] == kept[:, -1].tolist()


@pytest.mark.parametrize("name", sorted(ATTACHED.keys() - {"hf-videomae"}))
def test_pictures_of_hosts_of_images(name: str) -> None:
    case = ATTACHED[name]
    model = attached(case)
    inputs = case.inputs(model)
    images = inputs["pixel_values"] if isinstance(inputs, dict) else inputs[0]
    _, kept = torch.no_grad()(recorded)(case, model)
    for seen, counts in zip(see(model, images), kept.tolist(), strict=True):
        assert seen.groups.shape[1:] == ((14, 14) if name == "open-clip-timm" else (4, 4))
        assert seen.kept == counts


def gradients(case: Case, model: Any) -> Tensor:
    """Gradients [2, L] of a loss and the FLOPs share, for merge and prune."""
    model.train().requires_grad_(False)
    model.ltmp.requires_grad_(True)
    with ltmp.record() as calls:
        output = case.call(model)
    # what the last block removes matters to the budget, at least
    (output.square().mean() + calls.share().mean()).backward()
    return torch.stack([model.ltmp.merge.grad, model.ltmp.prune.grad])


def test_both_thresholds_learn(case: Case) -> None:
    model = attached(case)
    found = gradients(case, model)
    assert found.isfinite().all()
    assert found.ne(0).all()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("ltmp."))


def test_gradient_checkpointing_changes_nothing_but_memory(case: Case) -> None:
    expected = gradients(case, attached(case))
    model = attached(case)
    case.checkpointing(model)
    entered: Counter[nn.Module] = Counter()
    body = attachment(model).body
    uncalled = body.recipe.attention(body.blocks[0])
    for leaf in body.blocks[0].modules():
        if not list(leaf.children()) and not any(leaf is module for module in uncalled):
            leaf.register_forward_hook(lambda module, *_: entered.update([module]))
    assert_close(gradients(case, model), expected, atol=1e-5 * float(expected.abs().max()))
    has = case.checkpointing.__name__ != "no_checkpointing"
    assert (max(entered.values()) > 1) == has, "recomputed where it was not asked for, or the other way round"


@torch.no_grad()
def test_saved_thresholds_load(case: Case, tmp_path: Path) -> None:
    model = attached(case)
    expected = case.call(model)
    ltmp.save(model, tmp_path / "thresholds.safetensors")
    fresh = case.build()
    ltmp.load(fresh, tmp_path / "thresholds.safetensors")
    assert torch.equal(case.call(fresh), expected)


def saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(case: Case, clone: Callable[[Any], Any]) -> None:
    model = attached(case)
    expected = case.call(model)
    twin = clone(model)
    assert torch.equal(case.call(twin), expected)
    assert attachment(twin).policy is twin.ltmp
    ltmp.detach(twin)
    assert torch.equal(case.call(twin), case.call(case.build()))
    assert torch.equal(case.call(model), expected)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_autocast(case: Case, masked: bool) -> None:
    """Reduces almost as in float32: a few rounded scores may fall on the other side of their threshold."""
    model = attached(case)
    _, expected = recorded(case, model)
    model.ltmp.train(masked).requires_grad_(masked)
    with torch.autocast("cpu", torch.bfloat16):
        output, kept = recorded(case, model)
    assert output.isfinite().all()
    assert (kept - expected).abs().max() <= max(3, 0.05 * case.tokens)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str) -> None:
    case = REFUSED[name]
    model = case.build()
    before = sorted(vars(model))
    with pytest.raises(ltmp.LTMPError) as refusal:
        ltmp.attach(model)
    assert case.refused in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert sorted(vars(model)) == before


def test_the_table_of_hosts_is_that_of_the_tests() -> None:
    written = subprocess.run([sys.executable, str(ROOT / "tools" / "host_table.py"), "--check"], capture_output=True)
    assert written.returncode == 0, "docs/hosts.md is stale: run python tools/host_table.py"
