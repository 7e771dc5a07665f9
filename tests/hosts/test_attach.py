"""Every kind of timm VisionTransformer against every behaviour of an attached model."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import RmsNorm, SwiGLU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    Block,
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    VisionTransformer,
)
from torch import Tensor, nn

import ltmp
import reference
from helpers import assert_close, attach_reducing, random_images, references, run_recorded, tiny_vit
from ltmp.config import LEARNED
from ltmp.hosts.attach import attachment, is_attached
from ltmp.learning import calibrate

CASES: dict[str, Callable[[], Any]] = {
    "plain": tiny_vit,
    "patch8": partial(tiny_vit, img_size=32, patch_size=8),
    "patch2": partial(tiny_vit, patch_size=2),
    "odd-tokens": partial(tiny_vit, img_size=20, patch_size=4),
    "depth1": partial(tiny_vit, depth=1),
    "depth4": partial(tiny_vit, depth=4),
    "avg": partial(tiny_vit, global_pool="avg"),
    "avg-with-prefix": partial(tiny_vit, global_pool="avg", pool_include_prefix=True),
    "avgmax": partial(tiny_vit, global_pool="avgmax"),
    "max": partial(tiny_vit, global_pool="max"),
    "map": partial(tiny_vit, global_pool="map"),
    "layer-scale": partial(tiny_vit, init_values=0.1),
    "qk-norm": partial(tiny_vit, qk_norm=True),
    "attn-norm": partial(tiny_vit, scale_attn_norm=True, scale_mlp_norm=True),
    "registers": partial(tiny_vit, reg_tokens=4),
    "registers-avg": partial(tiny_vit, reg_tokens=4, global_pool="avg"),
    "distilled": partial(tiny_vit, VisionTransformerDistilled),
    "no-class-token": partial(tiny_vit, class_token=False, global_pool="avg"),
    "no-class-token-map": partial(tiny_vit, class_token=False, global_pool="map"),
    "dynamic-size": partial(tiny_vit, dynamic_img_size=True),
    "no-embed-class": partial(tiny_vit, no_embed_class=True, reg_tokens=1),
    "pre-norm": partial(tiny_vit, pre_norm=True),
    "fc-norm": partial(tiny_vit, fc_norm=True),
    "no-fc-norm": partial(tiny_vit, global_pool="avg", fc_norm=False),
    "no-pos-embed": partial(tiny_vit, pos_embed="none"),
    "swiglu": partial(tiny_vit, mlp_layer=SwiGLU),
    "rms-norm": partial(tiny_vit, norm_layer=RmsNorm),
    "no-qkv-bias": partial(tiny_vit, qkv_bias=False),
}

POOLED = ["avg", "avg-with-prefix", "avgmax", "max", "map", "registers-avg", "no-class-token", "no-class-token-map"]


def image_size(model: Any) -> int:
    return int(model.patch_embed.img_size[0])


@dataclass(frozen=True)
class Expected:
    """Results of the reference implementation for a case."""

    merge: list[float]
    prune: list[float]
    counts: list[list[int]]
    logits: Tensor


@cache
def expected_of(case: str) -> Expected:
    model = CASES[case]()
    images = images_of(model)
    merge, prune = reference.calibrate(references(model, images), "ltmp")
    runs = [reference.run(image, merge, prune) for image in references(model, images)]
    assert min(image.margin for image, _ in runs) > 1e-6, "a decision is too close for this test"
    with torch.no_grad():
        logits = torch.stack([image.logits() for image, _ in runs])
    return Expected(merge, prune, [counts for _, counts in runs], logits)


def images_of(model: Any, seed: int = 0) -> Tensor:
    return random_images(3, size=image_size(model), seed=seed)


def reducing(case: str) -> tuple[Any, Tensor, Expected]:
    """The attached case in eval mode, with thresholds that remove tokens of these images."""
    model, expected = CASES[case](), expected_of(case)
    ltmp.attach(model).ltmp.set(expected.merge, expected.prune)
    return model, images_of(model), expected


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


# -- nothing selected: nothing changes


@torch.no_grad()
def test_off_thresholds_give_the_dense_output(case: str) -> None:
    model = CASES[case]()
    images = images_of(model)
    dense = model(images)
    ltmp.attach(model)
    assert_close(model(images), dense, atol=1e-5)
    model.ltmp.train().requires_grad_()
    assert_close(model(images), dense, atol=1e-5 * max(1.0, float(dense.abs().max())), what="masked")


def test_off_thresholds_run_the_hosts_own_blocks() -> None:
    model = ltmp.attach(tiny_vit())
    calls: list[int] = []
    for i, block in enumerate(attachment(model).body.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.append(i))
    with torch.no_grad():
        model(images_of(model))
    assert calls == [0, 1, 2]


def test_blocks_before_the_first_reduction_are_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ltmp.attach(tiny_vit())
    model.ltmp.set([1.0, 1.0, -1.0], [0.0, 0.0, 0.0])
    calls: list[int] = []
    forward = Block.forward

    def spy(self: Any, x: Tensor, **named: Any) -> Tensor:
        calls.append(list(model.blocks).index(self))
        return forward(self, x, **named)

    monkeypatch.setattr(Block, "forward", spy)
    with torch.no_grad():
        _, kept = run_recorded(model, images_of(model))
    assert calls == [0, 1]
    assert kept[:, :2].eq(17).all()
    assert kept[:, 2].lt(17).all()


def test_parameter_names_stay(case: str) -> None:
    model = CASES[case]()
    before = list(model.state_dict())
    ltmp.attach(model)
    assert sorted(model.state_dict()) == sorted([*before, "ltmp.merge", "ltmp.prune"])
    model.load_state_dict({key: value + 0 for key, value in model.state_dict().items()})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that attaching could have changed, objects by identity."""
    modules = {
        name: (id(module), module.training, sorted(vars(module)), len(module._forward_hooks))
        for name, module in model.named_modules()
    }
    return {"modules": modules, "state": {k: v.clone() for k, v in model.state_dict().items()}}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before["modules"] == after["modules"]
    assert before["state"].keys() == after["state"].keys()
    for key, value in before["state"].items():
        assert torch.equal(value, after["state"][key])


@torch.no_grad()
def test_detach_restores_bit_for_bit(case: str) -> None:
    model = CASES[case]()
    images, before = images_of(model), snapshot(model)
    dense = model(images)
    expected = expected_of(case)
    ltmp.attach(model).ltmp.set(expected.merge, expected.prune)
    assert not torch.equal(model(images), dense)
    ltmp.detach(model)
    assert_same(before, snapshot(model))
    assert torch.equal(model(images), dense)
    assert not is_attached(model)


def test_detach_keeps_the_mode_that_was_set_meanwhile() -> None:
    model = ltmp.attach(tiny_vit())
    model.train()
    ltmp.detach(model)
    assert all(module.training for module in model.modules())


def test_attach_again_starts_over() -> None:
    model, images, expected = reducing("plain")
    before = sorted(vars(model))
    ltmp.attach(model, ltmp.LTMPConfig(variant="ltm"))
    assert sorted(vars(model)) == before
    assert model.ltmp.merge.tolist() == [1.0] * 3
    assert len(model.norm._forward_hooks) <= 1
    model.ltmp.set(expected.merge)
    with torch.no_grad():
        _, kept = run_recorded(model, images)
    assert kept.lt(17).all()
    ltmp.detach(model)
    assert not any(type(module).__module__.startswith("ltmp") for module in model.modules())


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x).softmax(-1)  # type: ignore[no-any-return]


def test_attach_finds_the_host_inside_a_wrapper() -> None:
    wrapper = Wrapper(tiny_vit()).eval()
    before = snapshot(wrapper)
    ltmp.attach(wrapper)
    wrapper.ltmp.set(None, [0.05] * 3)
    with torch.no_grad():
        _, kept = run_recorded(wrapper, random_images(2))
    assert kept[:, -1].lt(17).all()
    ltmp.detach(wrapper)
    assert_same(before, snapshot(wrapper))


# -- real reduction


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("batch", [3, 1], ids=["batch", "one-by-one"])
def test_reduces_as_written_down(case: str, batch: int, masked: bool) -> None:
    """Token counts and logits; removed tokens do not enter the pooling of a head, and sizes are its weights."""
    model, images, expected = reducing(case)
    model.ltmp.train(masked).requires_grad_(masked)
    parts = [run_recorded(model, part) for part in images.split(batch)]
    kept = torch.cat([kept for _, kept in parts])
    assert kept.tolist() == expected.counts
    assert kept[:, -1].lt(model.patch_embed.num_patches + model.num_prefix_tokens).all()
    scale = max(1.0, float(expected.logits.abs().max()))
    assert_close(torch.cat([out for out, _ in parts]), expected.logits, atol=1e-5 * scale, what="logits")


@torch.no_grad()
def test_dynamic_size_takes_two_sizes() -> None:
    model = ltmp.attach(tiny_vit(dynamic_img_size=True))
    model.ltmp.set([0.5] * 3, [0.03] * 3)
    for size, tokens in ((16, 17), (24, 37)):
        images = random_images(2, size=size)
        packed, kept = run_recorded(model, images)
        model.ltmp.train().requires_grad_()
        assert_close(model(images), packed, atol=1e-4)
        model.ltmp.eval()
        assert kept[:, -1].lt(tokens).all()


def test_distilled_training_returns_both_heads() -> None:
    model, images, _ = reducing("distilled")
    model.train()
    model.set_distilled_training(True)
    first, second = model(images)
    assert first.shape == second.shape == (3, 5)
    assert not torch.equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("name", ["plain", "registers", "distilled", *POOLED])
def test_everything_pruned(name: str, masked: bool) -> None:
    """The prefix is left, or else the most important patch; a head that pools patches then pools the prefix."""
    model = CASES[name]()
    images, protected = images_of(model), model.num_prefix_tokens
    bare = references(model, images)
    ltmp.attach(model)
    model.ltmp.set(None, [0.0, 10.0, 0.0])
    model.ltmp.train(masked).requires_grad_(masked)
    logits, kept = run_recorded(model, images)
    assert kept[:, -1].eq(max(protected, 1)).all()
    expected = torch.stack([reference.run(i, model.ltmp.merge, model.ltmp.prune)[0].logits() for i in bare])
    assert_close(logits, expected, atol=1e-4)


# timm's own embedding refuses zero images with these two
@pytest.mark.parametrize("case", sorted(CASES.keys() - {"dynamic-size", "no-pos-embed"}))
@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_no_images(case: str, masked: bool) -> None:
    model, images, _ = reducing(case)
    model.ltmp.train(masked).requires_grad_(masked)
    logits, kept = run_recorded(model, images[:0])
    assert logits.shape == (0, 5)
    assert kept.shape == (0, len(attachment(model).body.blocks))


@torch.no_grad()
def test_equal_images_lose_equally_many_tokens() -> None:
    model, images, _ = reducing("plain")
    logits, kept = run_recorded(model, images[:1].expand(3, -1, -1, -1))
    assert (kept == kept[0]).all()
    assert_close(logits, logits[:1].expand(3, -1), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [("token", "avg"), ("avg", "token"), ("avg", "max")])
def test_pooling_changed_while_attached(before: str, after: str) -> None:
    """`reset_classifier` changes it; batches and single images still agree, and detach leaves nothing behind."""
    images = random_images(3)
    model = attach_reducing(tiny_vit(global_pool=before, fc_norm=False), images)
    model.reset_classifier(4, global_pool=after)
    batch = model(images)
    assert_close(batch, torch.cat([model(image) for image in images.split(1)]), atol=1e-5)
    model.ltmp.train().requires_grad_()
    assert_close(model(images), batch, atol=1e-4)
    ltmp.detach(model)
    assert not model.norm._forward_hooks
    assert "pool" not in vars(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["", "prr"])
def test_pooling_that_needs_every_token_is_refused(kind: str) -> None:
    model = attach_reducing(tiny_vit(global_pool=kind), random_images(3))
    with pytest.raises(NotImplementedError, match=r"needs every token.*ltmp\.unmerge"):
        model(random_images(3))
    with ltmp.unmerge():
        model(random_images(3))


@torch.no_grad()
def test_features_and_head_apart() -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(global_pool="avg"), images)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    with pytest.raises(ltmp.LTMPError, match="got lost between the blocks and the pooling"):
        model.forward_head(features.clone())


# -- training


@pytest.mark.parametrize("variant", LEARNED)
def test_gradients_reach_the_thresholds(variant: str) -> None:
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant=variant))
    merge, prune = reference.calibrate(references(ltmp.detach(tiny_vit()), random_images(3)), variant)
    model.ltmp.set(merge, prune)
    model.train().requires_grad_(False)
    model.ltmp.requires_grad_(True)
    with ltmp.record() as calls:
        model(random_images(3)).square().sum().backward(retain_graph=True)
    for step in model.ltmp.config.steps:
        grad = getattr(model.ltmp, step).grad
        assert grad.isfinite().all()
        # the class token does not see what the last block removes, behind its attention; the budget does
        assert grad[:-1].ne(0).all(), f"{step}: {grad}"
    calls.share().sum().backward()
    for step in model.ltmp.config.steps:
        assert getattr(model.ltmp, step).grad.ne(0).all()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("ltmp."))


def test_gradients_reach_the_thresholds_of_every_case(case: str) -> None:
    model, images, _ = reducing(case)
    model.train().ltmp.requires_grad_()
    with ltmp.record() as calls:
        out = model(images)
    (out.square().sum() + calls.share().sum()).backward()
    for parameter in model.ltmp.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.ne(0).all()


@pytest.mark.parametrize("name", ["avg", "avgmax", "map", "no-class-token"])
def test_a_head_that_pools_sees_what_the_last_block_removes(name: str) -> None:
    """Otherwise only the budget would determine these thresholds, and remove every token."""
    model, images, _ = reducing(name)
    model.train().ltmp.requires_grad_()
    model(images).square().sum().backward()
    for grad in (model.ltmp.merge.grad, model.ltmp.prune.grad):
        assert grad.isfinite().all()
        assert grad[-1] != 0


@pytest.mark.parametrize("name", ["plain", "avg", "registers", "distilled", "map"])
def test_gradient_checkpointing_changes_nothing_but_memory(name: str) -> None:
    outputs, gradients, entered = [], [], []
    for checkpointing in (False, True):
        model, images, _ = reducing(name)
        model.train().ltmp.requires_grad_()
        model.set_grad_checkpointing(checkpointing)
        calls: list[int] = []
        attachment(model).body.blocks[0].norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with ltmp.record() as recorded:
            out = model(images)
        out.square().sum().backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([model.ltmp.merge.grad, model.ltmp.prune.grad]))
        entered.append(len(calls))
        assert (recorded.kept[0][:, -1] < 17 + model.num_prefix_tokens - 1).all()
    assert_close(outputs[1], outputs[0], atol=1e-6)
    assert_close(gradients[1], gradients[0], atol=1e-5 * float(gradients[0].abs().max()))
    assert entered[0] == 1
    assert entered[1] > 1, "nothing was recomputed: checkpointing was off"


@torch.no_grad()
def test_gradient_checkpointing_in_eval_still_reduces() -> None:
    model, images, expected = reducing("avg")
    model.set_grad_checkpointing(True)
    logits, kept = run_recorded(model, images)
    assert kept.tolist() == expected.counts
    assert_close(logits, expected.logits, atol=1e-4)


# -- number formats, copies, threads


def test_inference_mode() -> None:
    model, images, expected = reducing("plain")
    with torch.inference_mode():
        logits, kept = run_recorded(model, images)
    assert kept.tolist() == expected.counts
    assert_close(logits, expected.logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("form", ["autocast", "bfloat16", "half"])
@pytest.mark.parametrize("name", ["plain", "avg", "map", "qk-norm", "registers"])
def test_half_precision(name: str, form: str, masked: bool) -> None:
    """Reduces much as in float32: a rounded score may fall on the other side of its threshold here and there."""
    model, images, expected = reducing(name)
    model.ltmp.train(masked).requires_grad_(masked)
    if form == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            logits, kept = run_recorded(model, images)
    else:
        model = getattr(model, form)()
        logits, kept = run_recorded(model, images.to(next(model.parameters()).dtype))
        assert logits.dtype == {"bfloat16": torch.bfloat16, "half": torch.float16}[form]
    assert logits.isfinite().all()
    assert (kept - torch.tensor(expected.counts)).abs().max() <= 2
    assert kept[:, -1].lt(model.patch_embed.num_patches + model.num_prefix_tokens).all()


@pytest.mark.parametrize("form", ["half", "bfloat16", "double"])
def test_thresholds_keep_every_bit(form: str) -> None:
    model, _, expected = reducing("plain")
    getattr(model, form)()
    assert model.ltmp.merge.dtype == torch.float32
    assert model.ltmp.merge.tolist() == expected.merge
    assert model.ltmp.prune.tolist() == expected.prune


def saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.deepcopy, saved_and_loaded], ids=["deepcopy", "torch.save"])
def test_copies_are_whole_and_their_own(case: str, clone: Callable[[Any], Any]) -> None:
    model, images, _ = reducing(case)
    logits = model(images)
    twin = clone(model)
    assert torch.equal(twin(images), logits)
    twin.ltmp.set([1.0] * twin.ltmp.depth, [0.0] * twin.ltmp.depth)
    assert attachment(twin).policy is twin.ltmp
    assert torch.equal(model(images), logits)
    assert not torch.equal(twin(images), logits)
    ltmp.detach(twin)
    assert_close(twin(images), CASES[case]()(images), atol=1e-6)
    assert is_attached(model)


@pytest.mark.parametrize("name", ["plain", "avg"])
def test_two_threads_call_one_model(name: str) -> None:
    model, _, _ = reducing(name)
    batches = [images_of(model, seed=seed)[: 1 + seed % 3] for seed in range(2)]
    with torch.no_grad():
        expected = [run_recorded(model, batch) for batch in batches]
    wrong: list[str] = []

    def call(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                logits, kept = run_recorded(model, batches[i])
                if not (torch.equal(kept, expected[i][1]) and torch.allclose(logits, expected[i][0], atol=1e-6)):
                    wrong.append(f"thread {i}")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# -- refusals


class OwnFeatures(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        return super().forward_features(x)


def gated() -> Any:
    model = tiny_vit()
    model.blocks[1].attn.gate = nn.Linear(16, 16)
    return model


def other_mlp() -> Any:
    model = tiny_vit()
    model.blocks[2].mlp = nn.Sequential(nn.Linear(16, 16))
    return model


def hooked() -> Any:
    model = tiny_vit()
    model.blocks[1].attn.register_forward_hook(lambda *_: None)
    return model


def other_names() -> Any:
    model = tiny_vit()
    model.layers = model.blocks
    del model.blocks
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "parallel": (partial(tiny_vit, block_fn=ParallelScalingBlock), "is ParallelScalingBlock, which runs attention and"),
    "diff-parallel": (
        partial(tiny_vit, block_fn=DiffParallelScalingBlock),
        "is DiffParallelScalingBlock, which runs attention and",
    ),
    "parallel-things": (
        partial(tiny_vit, block_fn=ParallelThingsBlock),
        "is ParallelThingsBlock, which runs several attentions",
    ),
    "gated": (gated, "gate"),
    "diff-attention": (partial(tiny_vit, attn_layer="diff"), "uses DiffAttention, which subtracts two attention maps"),
    "attention-dropout": (partial(tiny_vit, attn_drop_rate=0.1), "attn_drop_rate=0"),
    "hooked": (hooked, "blocks.1 has forward hooks"),
    "other-mlp": (other_mlp, "Sequential"),
    "own-features": (partial(tiny_vit, OwnFeatures), "OwnFeatures has its own forward_features"),
    "resnet": (lambda: timm.create_model("resnet10t").eval(), "found none of the known hosts"),
    "linear": (lambda: nn.Linear(2, 2), "found none of the known hosts"),
    "another-version": (other_names, "its parts have other names than in the versions that ltmp supports"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_and_changes_nothing(name: str) -> None:
    build, fragment = REFUSED[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(ltmp.LTMPError) as refusal:
        ltmp.attach(model)
    assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert_same(before, snapshot(model))


def test_names_every_reason() -> None:
    model = tiny_vit(OwnFeatures, attn_drop_rate=0.1)
    with pytest.raises(ltmp.LTMPError, match="forward_features") as refusal:
        ltmp.attach(model)
    assert "attn_drop_rate" in str(refusal.value)


def test_attaching_around_an_attached_model_is_refused() -> None:
    wrapper = Wrapper(ltmp.attach(tiny_vit()))
    with pytest.raises(ltmp.LTMPError, match="already attached"):
        ltmp.attach(wrapper)
    assert not hasattr(wrapper, "ltmp")
    assert attachment(wrapper).policy is wrapper.backbone.ltmp


@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("name", ["merge", "prune"])
def test_nan_thresholds_are_refused(name: str, masked: bool) -> None:
    """They do not come through `set`, but from a state dict or a diverged optimiser."""
    model, images, _ = reducing("plain")
    model.ltmp.train(masked).requires_grad_(masked)
    model.load_state_dict({f"ltmp.{name}": torch.tensor([0.5, float("nan"), 0.5])}, strict=False)
    with pytest.raises(ltmp.LTMPError, match="a threshold is NaN"):
        model(images)


CALLS: dict[str, Callable[[Any, Tensor], Any]] = {
    "attn_mask": lambda model, x: model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool)),
    "is_causal": lambda model, x: model(x, is_causal=True),
    "intermediates with attn_mask": lambda model, x: model.forward_intermediates(x, attn_mask=torch.ones(17, 17)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_what_a_reduced_model_cannot_do_is_said(name: str, masked: bool) -> None:
    model, images, _ = reducing("plain")
    model.ltmp.train(masked).requires_grad_(masked)
    with pytest.raises(NotImplementedError, match=r"ltmp\.detach\(model\)"):
        CALLS[name](model, images)
    ltmp.detach(model)
    CALLS[name](model, images)


def test_attached_in_the_hosts_mode() -> None:
    """A new module is in train mode: tokens of an eval model would silently be masked instead of packed."""
    assert not ltmp.attach(tiny_vit().eval()).ltmp.training
    assert ltmp.attach(tiny_vit().train()).ltmp.training


def test_a_model_attached_in_inference_mode_is_set_outside_of_it(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(scores="attention"))
        calibrate(model, random_images(4), 0.7)
        ltmp.save(model, tmp_path / "t.safetensors")
    ltmp.load(model, tmp_path / "t.safetensors")
    model.ltmp.set([0.5] * 3, [0.01] * 3)
    assert model.ltmp.merge.tolist() == [0.5] * 3
