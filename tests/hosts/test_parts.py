"""Changes to parts of an attached model's blocks take effect in every engine, or raise a clear error."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, open_clip_tower, torchvision_vit
from timm.layers import DropPath
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

import ltmp
from helpers import assert_close, random_images, run_recorded, tiny_vit
from ltmp.engines.plain import look
from ltmp.hosts.attach import attachment

IMAGES = random_images(3)
ATOL = 2e-5  # float32, one engine against another

HOSTS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "timm": (tiny_vit, "blocks.1", "attn"),
    "torchvision": (torchvision_vit, "encoder.layers.encoder_layer_1", "self_attention"),
    "open_clip": (open_clip_tower, "transformer.resblocks.1", "attn"),
    "transformers": (CASES["hf-dinov2"].build, "dinov2.encoder.layer.1", "attention"),
}


class Tripled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


class TripledGELU(nn.GELU):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class TripledNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Around(nn.Module):
    """An attention that looks like the one inside it."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)


def reduced(model: Any) -> Any:
    """Attached, with thresholds at which tokens go in each block."""
    ltmp.attach(model, ltmp.LTMPConfig(engine="packed"))
    model.ltmp.set([0.6] * model.ltmp.depth, [0.03] * model.ltmp.depth)
    return model


def put(model: nn.Module, path: str, part: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, part)


def masked(model: Any) -> Tensor:
    """Logits of the engine that calls a host's own modules."""
    model.ltmp.requires_grad_(True).train()
    try:
        return model(IMAGES).detach()  # type: ignore[no-any-return]
    finally:
        model.ltmp.requires_grad_(False).eval()


PARTS: dict[str, Callable[[], nn.Module]] = {
    "drop_path1": Tripled,
    "drop_path2": Tripled,
    "attn.proj_drop": Tripled,
    "mlp.drop1": Tripled,
    "mlp.drop2": Tripled,
    "mlp.act": TripledGELU,
    "norm1": lambda: TripledNorm(16),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_other_classes_run(part: str, when: str) -> None:
    plain, model = reduced(tiny_vit()), tiny_vit()
    if when == "before":
        put(model, f"blocks.1.{part}", PARTS[part]())
    reduced(model)
    if when == "after":
        with torch.no_grad():
            model(IMAGES)
        put(model, f"blocks.1.{part}", PARTS[part]())
    with torch.no_grad():
        assert (model(IMAGES) - plain(IMAGES)).abs().max() > 1e-3
        assert_close(model(IMAGES), masked(model), ATOL, part)


@pytest.mark.parametrize("part", ["mlp", "mlp.act", "ls1", "drop_path1"])
def test_a_forward_set_on_a_part_runs(part: str) -> None:
    model = reduced(tiny_vit(init_values=0.5))
    with torch.no_grad():
        before = model(IMAGES)
        module = model.get_submodule(f"blocks.1.{part}")
        own = module.forward
        module.forward = lambda x: 3 * own(x)
        assert (model(IMAGES) - before).abs().max() > 1e-4
        assert_close(model(IMAGES), masked(model), ATOL, part)


def test_the_form_of_an_activation_may_change() -> None:
    model = reduced(tiny_vit())
    with torch.no_grad():
        model(IMAGES)
        for block in model.blocks:
            block.mlp.act = nn.GELU()
        exact = model(IMAGES)
        for block in model.blocks:
            block.mlp.act.approximate = "tanh"
        assert (model(IMAGES) - exact).abs().max() > 5 * ATOL
        assert_close(model(IMAGES), masked(model), ATOL, "tanh")


def _replace(attention: nn.Module, block: Any, name: str) -> None:
    setattr(block, name, Around(attention))


def _set_forward(attention: Any, block: Any, name: str) -> None:
    own = attention.forward
    attention.forward = lambda *args, **kwargs: own(*args, **kwargs)


def _drop(attention: Any, block: Any, name: str) -> None:
    drop = getattr(attention, "attn_drop", None)
    if drop is not None:
        drop.p = 0.5
    else:
        key = next(key for key in ("dropout", "attention_dropout", "dropout_prob") if key in vars(attention))
        setattr(attention, key, 0.5)


CHANGES = {"replaced": _replace, "forward": _set_forward, "dropout": _drop}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("host", HOSTS)
def test_changes_of_an_attention_are_refused(host: str, change: str) -> None:
    build, path, name = HOSTS[host]
    model = reduced(build())
    block = model.get_submodule(path)
    CHANGES[change](getattr(block, name), block, name)
    with torch.no_grad(), pytest.raises(ltmp.LTMPError, match=r"after attaching.*ltmp\.detach"):
        model(IMAGES)
    with ltmp.dense():
        model(IMAGES)


@pytest.mark.parametrize("fused", [True, False])
def test_a_scale_of_its_own_is_refused(fused: bool) -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn.fused_attn = fused
    attached = reduced(copy.deepcopy(model))
    attached.blocks[1].attn.scale = 0.3
    with pytest.raises(ltmp.LTMPError, match=r"Attention\.scale of this VisionTransformer was changed"):
        attached(IMAGES)
    for block in model.blocks:
        block.attn.scale = 0.3
    if fused:
        ltmp.attach(model)  # torch's fused attention does not ask for it
        return
    with pytest.raises(ltmp.LTMPError, match=r"scales its attention by 0\.3"):
        ltmp.attach(model)


@pytest.mark.parametrize("kind", [nn.Dropout, DropPath])
def test_dropout_that_is_switched_on_alone_counts(kind: type[nn.Module]) -> None:
    model = reduced(tiny_vit(proj_drop_rate=0.3, drop_path_rate=0.5))
    for module in model.modules():
        module.train(isinstance(module, kind)) if not module._modules else None
    with torch.no_grad():
        torch.manual_seed(0)
        assert (model(IMAGES) - model(IMAGES)).abs().max() > 1e-3


def test_computed_weights_of_an_attention_are_refused_and_those_of_layers_are_current() -> None:
    model = reduced(torchvision_vit())
    prune.l1_unstructured(model.encoder.layers[1].self_attention, "in_proj_weight", 0.5)
    with pytest.raises(ltmp.LTMPError, match="would not run"):
        model(IMAGES)
    model = reduced(tiny_vit(init_values=0.5))
    prune.l1_unstructured(model.blocks[1].ls1, "gamma", 0.5)
    prune.l1_unstructured(model.blocks[0].norm1, "weight", 0.5)
    with torch.no_grad():
        model.blocks[1].ls1.gamma_orig.mul_(3)
        model.blocks[0].norm1.weight_orig.mul_(3)
        assert_close(model(IMAGES), masked(model), ATOL, "pruned weights")


def test_hooks_on_attention_dropout_and_on_all_modules(caplog: pytest.LogCaptureFixture) -> None:
    model = reduced(tiny_vit())
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        model(IMAGES)
    finally:
        handle.remove()
    assert "no attention module" in caplog.text
    model.blocks[0].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(ltmp.LTMPError, match="attn_drop would not run"):
        model(IMAGES)


def test_hooks_of_another_process_are_looked_for() -> None:
    model = reduced(tiny_vit())
    model(IMAGES)
    found = attachment(pickle.loads(pickle.dumps(model)))
    assert set(found._unhooked.values()) == {-1}


def test_unfrozen_thresholds_of_a_pooled_host_stay() -> None:
    model = reduced(tiny_vit(global_pool="avg"))
    model.requires_grad_(True).train()
    model(IMAGES).sum().backward()
    assert model.ltmp.merge.grad is None or not model.ltmp.merge.grad.any()
    assert model.ltmp.prune.grad is None or not model.ltmp.prune.grad.any()


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_thresholds_of_another_type_are_converted(kind: torch.dtype) -> None:
    model = reduced(tiny_vit())
    model.ltmp.set([0.5] * 3, [0.03125] * 3)  # exact in bfloat16
    logits, kept = run_recorded(model, IMAGES)
    model.load_state_dict({name: value.to(kind) for name, value in model.state_dict().items()}, assign=True)
    assert model.ltmp.merge.dtype == torch.float32
    again, left = run_recorded(model.to(kind), IMAGES.to(kind))
    assert again.shape == logits.shape
    assert torch.equal(left, kept) or kind == torch.bfloat16
    assert left[:, -1].max() < 17


def test_thresholds_anywhere_in_memory_are_read() -> None:
    model = reduced(tiny_vit())
    expected = model(IMAGES)
    wide = torch.ones(2 * len(model.ltmp.merge))
    wide[::2] = model.ltmp.merge.detach()
    model.ltmp.merge.data = wide[::2]
    assert torch.equal(model(IMAGES), expected)


def test_thresholds_of_a_functional_call_count() -> None:
    model = reduced(tiny_vit())
    expected = model(IMAGES)
    values = {f"ltmp.{name}": getattr(model.ltmp, name).detach().clone() for name in ("merge", "prune")}
    model.ltmp.set([1.0] * 3, [0.0] * 3)
    assert torch.equal(functional_call(model, values, (IMAGES,)), expected)


def test_transforms_that_cannot_follow_are_told_so() -> None:
    model = reduced(tiny_vit())
    weights = {name: value.detach() for name, value in model.named_parameters()}
    each = vmap(grad(lambda p, image: functional_call(model, p, (image[None],)).sum()), (None, 0))
    with pytest.raises(ltmp.LTMPError, match="vmap"):
        each(weights, IMAGES)
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images = mode.from_tensor(IMAGES)
        with pytest.raises(ltmp.LTMPError, match="FakeTensorMode"):
            model(images)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    plain, model = tiny_vit(), reduced(tiny_vit())
    with torch.no_grad():
        expected = model(IMAGES)
        # stands for a GPU
        with torch.device("meta"):
            assert torch.equal(model(IMAGES), expected)
            assert ltmp.attach(plain).ltmp.merge.device.type == "cpu"
            plain(IMAGES)


@pytest.mark.parametrize("build", [torchvision_vit, open_clip_tower])
def test_a_replaced_mlp_runs(build: Callable[[], Any]) -> None:
    model = reduced(build())
    block = next(module for module in model.modules() if hasattr(module, "ln_2"))
    block.mlp = Tripled()
    with torch.no_grad():
        assert_close(model(IMAGES), masked(model), ATOL, "mlp")


def test_a_part_of_a_copy_is_detached_with_what_is_around_it() -> None:
    whole = reduced(nn.Sequential(tiny_vit(), nn.Identity()))
    twin = copy.deepcopy(whole)
    ltmp.detach(twin[0])
    assert not any("ltmp" in name for name in twin.state_dict())
    assert any("ltmp" in name for name in whole.state_dict())


def test_a_copied_norm_keeps_no_hook() -> None:
    model = reduced(tiny_vit(global_pool="avg", fc_norm=False))
    model.norm = copy.deepcopy(model.norm)
    ltmp.detach(model)
    assert not model.norm._forward_hooks


def test_a_tower_that_is_to_hand_out_tokens_is_refused() -> None:
    model = reduced(open_clip_tower())
    model.output_tokens = True
    with pytest.raises(ltmp.LTMPError, match="output_tokens=False"):
        model(IMAGES)


def parts_of(model: Any) -> list[Any]:
    body = attachment(model).body
    return look(body.memory, body.recipe, body.blocks).parts(body.blocks)


@pytest.mark.parametrize("build", [tiny_vit, torchvision_vit, CASES["hf-dinov2"].build])
def test_plain_blocks_run_by_their_parts(build: Callable[[], Any]) -> None:
    assert None not in parts_of(reduced(build()))


def test_a_forward_that_was_patched_and_restored_is_the_modules_own() -> None:
    model = reduced(tiny_vit())
    expected = model(IMAGES)
    for path in ("attn", "mlp"):
        module = model.blocks[1].get_submodule(path)
        own = module.forward
        module.forward = lambda *args, own=own, **kwargs: own(*args, **kwargs)
        with ltmp.dense():
            model(IMAGES)
        module.forward = own
    assert None not in parts_of(model)
    assert_close(model(IMAGES), expected, ATOL, "restored")


def test_accelerate_may_move_the_inputs_of_modules() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = reduced(tiny_vit())
    expected = model(IMAGES)
    places = dict.fromkeys([name for name, _ in model.named_children()], "cpu")
    places |= dict.fromkeys([name for name, _ in model.named_parameters(recurse=False)], "cpu")
    accelerate.dispatch_model(model, places, main_device="cpu", force_hooks=True)
    with torch.no_grad():
        assert_close(model(IMAGES), expected, ATOL, "dispatched")


def test_dropout_that_drops_nothing_may_take_the_place_of_another() -> None:
    model = reduced(tiny_vit())
    expected = model(IMAGES)
    model.blocks[1].attn.attn_drop = nn.Identity()
    assert torch.equal(model(IMAGES), expected)
    model.blocks[1].attn.attn_drop = nn.Dropout(0.1)
    with pytest.raises(ltmp.LTMPError, match="attn_drop of a block"):
        model(IMAGES)


@pytest.mark.parametrize("how", ["attribute", "hook"])
def test_a_model_that_is_referred_to_from_inside_is_freed(how: str) -> None:
    model = reduced(tiny_vit())
    if how == "attribute":
        model.blocks[1].mlp.owner = [model]
    else:
        model.blocks[1].mlp.register_forward_hook(lambda *_, model=model: None)
    with torch.no_grad():
        model(IMAGES)
    left = weakref.ref(model)
    del model
    gc.collect()
    assert left() is None


def test_copies_know_nothing_of_the_others_blocks() -> None:
    model = reduced(tiny_vit())
    with torch.no_grad():
        expected = model(IMAGES)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert not attachment(twin).body.memory
            twin.blocks[1].mlp.fc1.weight.mul_(3)
            assert (twin(IMAGES) - expected).abs().max() > 1e-3
        assert torch.equal(model(IMAGES), expected)
