"""An attached model is still an ordinary PyTorch model: usual operations on models work, or raise a clear error."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, open_clip_model, open_clip_tower, tiny_hf, torchvision_vit
from timm.layers import DropPath
from timm.models._features_fx import create_feature_extractor as timm_extractor
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import ltmp
from helpers import assert_close, attach_reducing, embed, random_images, run_recorded, tiny_vit
from ltmp.hosts.attach import attachment, find_attachment, is_attached
from ltmp.ops.probe.reference import WIDTH

IMAGES = random_images(3)


def reducing(**kwargs: Any) -> Any:
    return attach_reducing(tiny_vit(**kwargs), IMAGES)


def off(**kwargs: Any) -> Any:
    return ltmp.attach(tiny_vit(**kwargs))


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)  # type: ignore[no-any-return]


# -- containers and blocks


CONTAINERS: dict[str, tuple[Callable[[], Any], str]] = {
    "timm": (tiny_vit, "blocks"),
    "torchvision": (torchvision_vit, "encoder.layers"),
    "open_clip": (open_clip_tower, "transformer.resblocks"),
    "transformers": (CASES["hf-dinov2"].build, "dinov2.encoder.layer"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_blocks_are_blocks(name: str) -> None:
    build, path = CONTAINERS[name]
    model, plain = ltmp.attach(build()), build()
    blocks, own = model.get_submodule(path), plain.get_submodule(path)
    assert len(str(model)) > len(str(own))
    assert type(blocks) is type(own)
    assert type(blocks[:2]) is type(own)
    assert len(blocks) == len(list(blocks)) == len(own)
    for block in blocks:
        assert isinstance(block, nn.Module)
        block.requires_grad_(False)
    assert not any(p.requires_grad for p in blocks.parameters())
    assert inspect.signature(blocks[0].forward) == inspect.signature(own[0].forward)


def test_open_clip_locks_a_part_of_an_attached_tower() -> None:
    model = ltmp.attach(open_clip_model())
    model.lock_image_tower(unlocked_groups=1)
    trains = [any(p.requires_grad for p in block.parameters()) for block in model.visual.transformer.resblocks]
    assert trains == [False, False, True] or not all(trains)


@torch.no_grad()
@pytest.mark.parametrize("change", ["del", "slice", "replace"])
def test_blocks_that_were_changed_are_noticed(change: str) -> None:
    model = reducing()
    if change == "del":
        del model.blocks[-1]
    elif change == "slice":
        model.blocks = model.blocks[:2]
    else:
        model.blocks[1] = copy.deepcopy(tiny_vit().blocks[1])
    with pytest.raises(ltmp.LTMPError, match="changed after attaching"):
        model(IMAGES)
    with ltmp.dense():
        model(IMAGES)


@torch.no_grad()
def test_slices_of_blocks_hand_out_every_patch() -> None:
    model = reducing()
    x = embed(model, IMAGES)
    features = model.blocks[:2](x)
    assert features.shape == x.shape
    for block in list(model.blocks)[:2]:
        x = block(x)
    assert torch.equal(x, features)
    with pytest.raises(ltmp.LTMPError, match="block 1 of a reduced model goes on from what block 0"):
        model.blocks[1](embed(model, IMAGES))


@torch.no_grad()
def test_a_host_that_changes_its_features_between_two_blocks_is_refused() -> None:
    model = reducing()
    model.blocks.register_module("0", model.blocks[0])
    forward = type(model.blocks).forward

    def changes(x: Tensor) -> Tensor:
        for block in model.blocks:
            x = block(x) + 0
        return x

    model.blocks.forward = changes
    with pytest.raises(ltmp.LTMPError, match="between two blocks"):
        model(IMAGES)
    with ltmp.dense():
        assert torch.equal(model(IMAGES), tiny_vit()(IMAGES))
    del model.blocks.forward
    assert type(model.blocks).forward is forward


@torch.no_grad()
def test_threads_have_passes_of_their_own() -> None:
    """One thread calls the model while another calls its blocks."""
    model = reducing()
    expected, grids = model(IMAGES), model.blocks[:2](embed(model, IMAGES))
    wrong: list[str] = []

    @torch.no_grad()
    def whole() -> None:
        wrong.extend("whole" for _ in range(5) if not torch.equal(model(IMAGES), expected))

    @torch.no_grad()
    def parts() -> None:
        wrong.extend("part" for _ in range(5) if not torch.equal(model.blocks[:2](embed(model, IMAGES)), grids))

    threads = [threading.Thread(target=target) for target in (whole, parts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_blocks_used_twice_are_refused() -> None:
    model = tiny_vit()
    model.blocks = nn.Sequential(model.blocks[0], model.blocks[0])
    with pytest.raises(ltmp.LTMPError, match="runs a block several times"):
        ltmp.attach(model)


def test_two_transformers_in_one_model_are_asked_about() -> None:
    both = nn.ModuleDict({"student": tiny_vit(), "teacher": tiny_vit()})
    with pytest.raises(ltmp.LTMPError, match=r"student \(VisionTransformer\), teacher \(VisionTransformer\)"):
        ltmp.attach(both)
    assert not is_attached(both)
    ltmp.attach(both["teacher"])


@torch.no_grad()
@pytest.mark.parametrize("name", CONTAINERS)
def test_copies_of_blocks_alone_are_plain_blocks(name: str) -> None:
    """Not copies of the whole model that hang on them."""
    build, path = CONTAINERS[name]
    blocks, own = ltmp.attach(build()).get_submodule(path), build().get_submodule(path)
    whole = sum(p.numel() for p in own.parameters())
    for part, plain in ((blocks[0], own[0]), (blocks, own)):
        twin = copy.deepcopy(part)
        assert find_attachment(twin) is None
        assert len(pickle.dumps(twin)) < 4 * whole + 100_000
        x = torch.rand(2, 17, 32 if name != "timm" else 16)
        if not isinstance(part, nn.ModuleList):
            assert torch.equal(twin(x), plain(x))


# -- hooks


@torch.no_grad()
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.attn"])
def test_hooks_that_would_not_run_are_refused(where: str, register: str) -> None:
    model = reducing()
    expected = model(IMAGES)
    handle = getattr(model.get_submodule(where), register)(lambda *_: None)
    with pytest.raises(ltmp.LTMPError, match=rf"hooks on {where} .*ltmp\.dense.*forward_intermediates.*ltmp\.unmerge"):
        model(IMAGES)
    with ltmp.dense():
        model(IMAGES)
    handle.remove()
    assert torch.equal(model(IMAGES), expected)


@torch.no_grad()
def test_hooks_on_blocks_see_every_patch_where_features_are_unmerged() -> None:
    model = reducing()
    seen: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, __, output: seen.append(output))
    with ltmp.unmerge():
        model(IMAGES)
    expected = model.forward_intermediates(
        IMAGES, return_prefix_tokens=False, output_fmt="NLC", intermediates_only=True
    )
    assert [tuple(x.shape) for x in seen[:3]] == [(3, 17, 16)] * 3
    assert all(torch.equal(a[:, 1:], b) for a, b in zip(seen[:3], expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("where", ["norm1", "mlp", "mlp.act", "mlp.fc1"])
def test_hooks_inside_blocks_run_and_are_warned_of(where: str, caplog: pytest.LogCaptureFixture) -> None:
    model = reducing()
    expected = model(IMAGES)
    seen: list[Any] = []
    model.blocks[1].get_submodule(where).register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "ltmp"):
        assert_close(model(IMAGES), expected, 1e-5)
        model(IMAGES)
    assert len(seen) == 2
    assert [record.message for record in caplog.records if "hooks inside" in record.message] == [
        "hooks inside the blocks of a reduced model see only the tokens that are left, those of all images as rows "
        "[T, C], and no attention module: call the model inside `with ltmp.dense():` to hook all of it"
    ]


# -- number formats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_the_default_dtype_is_nobodys_business(dtype: torch.dtype, masked: bool) -> None:
    model = reducing()
    model.ltmp.train(masked).requires_grad_(masked)
    expected, kept = run_recorded(model, IMAGES)
    torch.set_default_dtype(dtype)
    try:
        found, same = run_recorded(model, IMAGES)
        found.sum().backward()
        fresh = ltmp.attach(tiny_vit())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert torch.equal(same, kept)
    assert fresh.ltmp.merge.dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_default_dtype_and_weights_in_half_precision(dtype: torch.dtype, masked: bool) -> None:
    """Lightning's `bf16-true`."""
    _, expected = run_recorded(reducing(), IMAGES)
    model = reducing().to(dtype)
    model.ltmp.train(masked).requires_grad_(masked)
    torch.set_default_dtype(dtype)
    try:
        logits, kept = run_recorded(model, IMAGES.to(dtype))
    finally:
        torch.set_default_dtype(torch.float32)
    assert logits.isfinite().all()
    assert kept.dtype == torch.float32
    assert (kept - expected).abs().max() <= 3


# -- training


def test_stochastic_depth_drops_whole_images() -> None:
    model = reducing(drop_path_rate=0.5).train()
    seen: list[list[bool]] = []
    for block in model.blocks:
        if isinstance(block.drop_path2, DropPath):
            block.drop_path2.register_forward_hook(lambda _, __, y: seen.append((y.flatten(1) == 0).all(1).tolist()))
    torch.manual_seed(0)
    _, kept = run_recorded(model, IMAGES)
    assert kept[:, -1].lt(17).all()
    assert all(len(images) == 3 for images in seen)
    assert any(any(images) for images in seen)
    assert not all(all(images) for images in seen)


def test_optimisers_of_the_model_leave_thresholds_alone() -> None:
    model = reducing().train()
    before = {name: value.clone() for name, value in model.ltmp.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    logits, kept = run_recorded(model, IMAGES)
    logits.sum().backward()
    optimizer.step()
    assert kept[:, -1].lt(17).all()
    assert model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in model.ltmp.state_dict().items())
    # nor does it ask to unfreeze the whole model
    for unfreeze in (model.requires_grad_, lambda on: [p.requires_grad_(on) for p in model.parameters()]):
        unfreeze(False)
        unfreeze(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
        model(IMAGES).sum().backward()
        optimizer.step()
        assert all(torch.equal(value, before[name]) for name, value in model.ltmp.state_dict().items())
    # asked for, they train
    model.ltmp.requires_grad_(True)
    model(IMAGES).sum().backward()
    assert model.ltmp.merge.grad.abs().sum() > 0


def test_weights_train_alike_masked_and_packed() -> None:
    found = []
    for masked in (False, True):
        model = reducing(global_pool="avg").train()
        model.ltmp.requires_grad_(masked)
        model(IMAGES).square().sum().backward()
        found.append(model.blocks[1].mlp.fc1.weight.grad)
    assert_close(found[1], found[0], 1e-5 * float(found[0].abs().max()))


def test_gradients_of_gradients_of_masked_tokens_are_refused() -> None:
    model = reducing()
    model.ltmp.train().requires_grad_(True)
    images = IMAGES.clone().requires_grad_()
    with pytest.raises(ltmp.LTMPError, match=r"gradients of gradients.*ltmp\.requires_grad_\(False\)"):
        torch.autograd.grad(model(images).sum(), images, create_graph=True)


def test_reentrant_checkpointing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reducing()
    model.set_grad_checkpointing()
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: True)
    with pytest.raises(ltmp.LTMPError, match="use_reentrant=False"):
        model(IMAGES.clone().requires_grad_())


# -- files of weights


@torch.no_grad()
def test_plain_checkpoints_load_strictly_and_keep_the_thresholds() -> None:
    model = reducing()
    before = model.ltmp.merge.clone()
    assert str(model.load_state_dict(tiny_vit().state_dict())) == "<All keys matched successfully>"
    assert torch.equal(model.ltmp.merge, before)
    with pytest.raises(RuntimeError, match=r"ltmp\.prune"):
        model.load_state_dict({**tiny_vit().state_dict(), "ltmp.merge": before})


def test_save_pretrained_writes_the_model_alone(tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import ViTForImageClassification

    model = tiny_hf("ViTForImageClassification", "ViTConfig")
    model.save_pretrained(tmp_path / "plain")
    ltmp.attach(model).ltmp.set([0.5] * 3, [0.02] * 3)
    model.save_pretrained(tmp_path / "attached")
    names = []
    for folder in ("plain", "attached"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]
    again, info = ViTForImageClassification.from_pretrained(tmp_path / "attached", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert torch.equal(again.classifier.weight, model.classifier.weight)
    assert "ltmp.probe" not in model._keys_to_ignore_on_save
    model.ltmp.set_probe(torch.zeros(3, 33, WIDTH + 2))
    assert {"ltmp.merge", "ltmp.prune", "ltmp.probe"} <= set(model._keys_to_ignore_on_save) <= set(model.state_dict())
    ltmp.detach(model)
    assert "ltmp.merge" not in (model._keys_to_ignore_on_save or ())


# -- wrappers


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sequential": lambda model: nn.Sequential(Halved(), model),
    "data-parallel": nn.DataParallel,
    "module": Wrapper,
}


@torch.no_grad()
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_models_attach_load_and_detach(name: str, tmp_path: Path) -> None:
    model = WRAPPERS[name](tiny_vit()).eval()
    keys, plain = list(model.state_dict()), model(IMAGES)
    ltmp.attach(model).ltmp.set([0.3] * 3, [0.01] * 3)
    reduced, kept = run_recorded(model, IMAGES)
    assert kept[:, -1].lt(17).all()
    ltmp.save(model, tmp_path / "t.safetensors")
    twin = copy.deepcopy(model)
    assert twin.ltmp is attachment(twin).policy
    ltmp.detach(model)
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "ltmp")
    assert torch.equal(model(IMAGES), plain)
    ltmp.load(model, tmp_path / "t.safetensors")
    assert torch.equal(model(IMAGES), reduced)
    assert torch.equal(twin(IMAGES), reduced)


@torch.no_grad()
def test_an_inner_part_is_detached_with_what_was_around_it() -> None:
    wrapper = ltmp.attach(Wrapper(tiny_vit()).eval())
    wrapper.ltmp.set([0.3] * 3, [0.01] * 3)
    inner = wrapper.backbone
    with pytest.raises(ltmp.LTMPError, match=r"already attached.*ltmp\.detach"):
        ltmp.attach(inner)
    assert is_attached(inner)
    ltmp.detach(inner)
    assert not is_attached(inner)
    assert not hasattr(wrapper, "ltmp")
    assert torch.equal(wrapper(IMAGES), tiny_vit()(IMAGES))


@torch.no_grad()
def test_adapters_come_off_an_attached_model() -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_vit(), peft.LoraConfig(target_modules=["qkv"])).eval()
    ltmp.attach(adapted).ltmp.set([0.3] * 3, [0.01] * 3)
    assert run_recorded(adapted, IMAGES)[1][:, -1].lt(17).all()
    model = adapted.merge_and_unload()
    assert run_recorded(model, IMAGES)[1][:, -1].lt(17).all()
    ltmp.detach(model)
    assert torch.equal(model(IMAGES), tiny_vit()(IMAGES))
    assert not hasattr(adapted, "ltmp")


def test_what_others_set_meanwhile_stays() -> None:
    model = off()
    model.blocks[0].forward = theirs = lambda x: x
    model.note = "theirs"
    ltmp.detach(model)
    assert model.blocks[0].forward is theirs
    assert model.note == "theirs"
    assert "forward" not in vars(model.blocks[1])


@torch.no_grad()
def test_compiled_models() -> None:
    """Compiled before or after attaching; every way of changing thresholds takes effect."""
    torch._dynamo.reset()
    model = tiny_vit(depth=1)
    compiled = torch.compile(model, backend="eager")
    plain = compiled(IMAGES)
    ltmp.attach(compiled)
    assert_close(compiled(IMAGES), plain, 1e-6)
    compiled.ltmp.merge.fill_(0.3)
    reduced, kept = run_recorded(compiled, IMAGES)
    assert kept[:, -1].lt(17).all()
    assert_close(reduced, model(IMAGES), 1e-5)
    with ltmp.dense():
        assert_close(compiled(IMAGES), plain, 1e-5)
    ltmp.detach(compiled)
    assert_close(compiled(IMAGES), plain, 1e-5)


def test_images_elsewhere_than_the_model_are_refused() -> None:
    with pytest.raises(ltmp.LTMPError, match=r"images are on meta .* on cpu.*DistributedDataParallel"):
        off()(IMAGES.to("meta"))


def test_blocks_sharded_one_by_one_are_refused() -> None:
    model = reducing()
    kind = type(model.blocks[1])
    # as torch.distributed.fsdp.fully_shard does it
    model.blocks[1].__class__ = type(f"FSDP{kind.__name__}", (kind,), {})
    with pytest.raises(ltmp.LTMPError, match=r"became FSDPBlocks.*\(FSDP\)"):
        model(IMAGES)
    with ltmp.dense():
        model(IMAGES)


@torch.no_grad()
def test_sharding_by_fsdp2(tmp_path: Path) -> None:
    """FSDP itself, in one process: sharding the model as a whole works, sharding single blocks is refused."""
    dist = pytest.importorskip("torch.distributed")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    mesh = pytest.importorskip("torch.distributed.device_mesh")
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    expected, plain = reducing()(IMAGES), tiny_vit()(IMAGES)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        here = mesh.init_device_mesh("cpu", (1,))
        model = fsdp.fully_shard(reducing(), mesh=here)
        assert_close(model(IMAGES), expected, 1e-6)
        blocks = reducing()
        for block in blocks.blocks:
            fsdp.fully_shard(block, mesh=here)
        with pytest.raises(ltmp.LTMPError, match=r"became FSDPBlocks.*\(FSDP\)"):
            blocks(IMAGES)
        with ltmp.dense():
            assert_close(blocks(IMAGES), plain, 1e-6)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_thresholds_that_come_from_the_meta_device_are_off() -> None:
    with torch.device("meta"):
        built = off()
    for model in (built, reducing().to("meta")):
        model.to_empty(device="cpu")
        assert model.ltmp.merge.eq(1).all()
        assert model.ltmp.prune.eq(0).all()
        model.load_state_dict(off().state_dict())
        assert_close(model(IMAGES), off()(IMAGES), 1e-6)
    kept = reducing().to_empty(device="cpu")
    assert torch.equal(kept.ltmp.merge, reducing().ltmp.merge)


@torch.no_grad()
def test_offloaded_weights_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, plain = reducing(), off()
    dense = plain(IMAGES)
    for offloaded in (model, plain):
        accelerate.cpu_offload(offloaded, execution_device="cpu")
    with pytest.raises(ltmp.LTMPError, match=r"meta device .*offloaded by accelerate"):
        model(IMAGES)
    with ltmp.dense():
        assert_close(model(IMAGES), dense, 1e-6)
    assert_close(plain(IMAGES), dense, 1e-6)


# -- quantised weights


class Quantised(Tensor):
    """A tensor subclass that supports operators of torch only, like torchao's."""

    products = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in ("mkldnn", "_addmm_activation")), "called past the subclass"
        cls.products += func is nn.functional.linear
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_weights_of_another_kind_run_in_their_own_layers() -> None:
    model = reducing()
    expected = model(IMAGES)
    for layer in model.blocks.modules():
        if isinstance(layer, nn.Linear):
            layer._parameters["weight"] = layer.weight.detach().as_subclass(Quantised)
    assert_close(model(IMAGES), expected, 1e-5)
    assert Quantised.products >= 3 * 4


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_weights_of_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = reducing()
    _, kept = run_recorded(model, IMAGES)
    for block in model.blocks:
        quantization.quantize_(block, getattr(quantization, config)())
    assert type(model.blocks[0].mlp.fc1.weight) is not nn.Parameter
    logits, again = run_recorded(model, IMAGES)
    assert logits.isfinite().all()
    assert (again - kept).abs().max() <= 3


@torch.no_grad()
def test_dynamic_int8_is_counted_as_it_multiplies() -> None:
    model = reducing()
    with ltmp.record() as calls:
        model(IMAGES)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with ltmp.record() as again:
        quantised(IMAGES)
    assert again.geometry == calls.geometry
    for block in quantised.blocks:
        block.mlp = nn.Identity()
    with pytest.raises(ltmp.LTMPError, match="cannot count the FLOPs of block 0"), ltmp.record():
        quantised(IMAGES)


# -- off is the host


@torch.no_grad()
@pytest.mark.parametrize("how", ["off", "dense"])
@pytest.mark.parametrize("training", [False, True])
def test_nothing_removed_is_nothing_attached(how: str, training: bool) -> None:
    plain = tiny_vit(global_pool="avg").train(training)
    model = (off if how == "off" else reducing)(global_pool="avg").train(training)
    mask = torch.ones(17, 17, dtype=torch.bool).tril()
    with ltmp.dense() if how == "dense" else torch.no_grad():
        assert torch.equal(model(IMAGES, attn_mask=mask), plain(IMAGES, attn_mask=mask))
        assert torch.equal(model(IMAGES, is_causal=True), plain(IMAGES, is_causal=True))
        features = model.forward_features(IMAGES)
        assert torch.equal(model.forward_head(features.clone().double().float().detach()), plain(IMAGES))
        for a, b in zip(model.forward_intermediates(IMAGES)[1], plain.forward_intermediates(IMAGES)[1], strict=True):
            assert torch.equal(a, b)
        x = embed(plain, IMAGES)
        assert torch.equal(model.blocks[1](x, attn_mask=mask), plain.blocks[1](x, attn_mask=mask))


@torch.no_grad()
def test_native_input_of_naflex() -> None:
    model, plain = ltmp.attach(CASES["naflex"].build()), CASES["naflex"].build()
    given = {
        "patches": torch.randn(2, 9, 48),
        "patch_coord": torch.stack(torch.meshgrid(torch.arange(3), torch.arange(3), indexing="ij"), -1)
        .view(1, 9, 2)
        .expand(2, -1, -1),
        "patch_valid": torch.arange(9) < torch.tensor([[9], [6]]),
    }
    assert torch.equal(model(given), plain(given))
    model.ltmp.set([0.3] * 3, [0.02] * 3)
    with pytest.raises(NotImplementedError, match=r"attn_mask.*ltmp\.dense"):
        model(given)
    with ltmp.dense():
        assert torch.equal(model(given), plain(given))


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_what_transformers_records_and_masks(training: bool) -> None:
    model, plain = (tiny_hf("ViTForImageClassification", "ViTConfig").train(training) for _ in range(2))
    ltmp.attach(model)
    for named in ({"output_hidden_states": True}, {"attention_mask": torch.ones(3, 17).tril().bool()}):
        encoders = (model.vit, plain.vit) if "attention_mask" in named else (model, plain)
        torch.manual_seed(0)
        found = encoders[0](IMAGES, **named)
        torch.manual_seed(0)
        wanted = encoders[1](IMAGES, **named)
        assert torch.equal(found[0], wanted[0])
        if "output_hidden_states" in named:
            assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True))


@torch.no_grad()
def test_tracers_of_a_model_that_is_off() -> None:
    expected = tiny_vit()(IMAGES)
    for strict in (False, True):
        program = torch.export.export(off(), (IMAGES,), strict=strict)
        assert_close(program.module()(IMAGES), expected, 1e-5)
    with pytest.warns():
        traced = torch.jit.trace(off(), (IMAGES,))
    assert_close(traced(IMAGES), expected, 1e-5)
    found = timm_extractor(off(), {"blocks.1": "out"})(IMAGES)
    wanted = timm_extractor(tiny_vit(), {"blocks.1": "out"})(IMAGES)
    assert torch.equal(found["out"], wanted["out"])
    nodes = get_graph_node_names(tiny_vit(global_pool="avg"))[1]
    assert get_graph_node_names(off(global_pool="avg"))[1] == nodes
    found, wanted = (timm_extractor(build(global_pool="avg"), {nodes[-1]: "out"})(IMAGES) for build in (off, tiny_vit))
    assert torch.equal(found["out"], wanted["out"])
    model, plain = ltmp.attach(torchvision_vit()), torchvision_vit()
    nodes = get_graph_node_names(plain)[1]
    assert get_graph_node_names(model)[1] == nodes
    node = next(name for name in reversed(nodes) if "encoder_layer_2" in name)
    found, wanted = (create_feature_extractor(m, [node])(IMAGES) for m in (model, plain))
    assert torch.equal(found[node], wanted[node])


def trace_export(model: Any) -> Any:
    return torch.export.export(model, (IMAGES,))


def trace_export_strictly(model: Any) -> Any:
    try:
        return torch.export.export(model, (IMAGES,), strict=True)
    except torch._dynamo.exc.Unsupported as error:  # what the compiler makes of any exception
        raise ltmp.LTMPError(str(error)) from error


def trace_onnx(model: Any) -> Any:
    import io

    return torch.onnx.export(model, (IMAGES,), io.BytesIO(), dynamo=False)


TRACERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "jit.trace": (lambda model: torch.jit.trace(model, (IMAGES,)), r"torch\.jit\.trace"),
    "jit.script": (torch.jit.script, r"torch\.jit\.script"),
    "onnx": (trace_onnx, r"torch\.onnx\.export\(dynamo=False\)"),
    "fx": (torch.fx.symbolic_trace, r"torch\.fx"),
    "fx-timm": (lambda model: timm_extractor(model, {"blocks.1": "out"}), "create_feature_extractor"),
    "export": (trace_export, r"torch\.export"),
    "export-strict": (trace_export_strictly, r"torch\.export"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", TRACERS)
def test_tracers_of_a_reduced_model_are_told_what_works(name: str) -> None:
    trace, named = TRACERS[name]
    with pytest.raises(ltmp.LTMPError, match=rf"{named}.*ltmp export"):
        trace(reducing())


def test_openvino_is_told_what_works() -> None:
    openvino = pytest.importorskip("openvino")
    with torch.no_grad(), pytest.raises(Exception, match=r"openvino\.convert_model.*ltmp export"):
        openvino.convert_model(reducing(), example_input=IMAGES)


# -- heads


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_a_last_block_learned_for_a_class_token_head_prunes_nothing_under_another(masked: bool) -> None:
    model = tiny_vit(fc_norm=False)
    ltmp.attach(model).ltmp.set([1.0] * 3, [0.0, 0.03, 1.0])
    model.ltmp.train(masked).requires_grad_(masked)
    assert run_recorded(model, IMAGES)[1][:, -1].tolist() == [1.0] * 3
    torch.manual_seed(0)
    model.reset_classifier(5, "avg")
    logits, kept = run_recorded(model, IMAGES)
    assert torch.equal(kept[:, -1], kept[:, -2])
    with ltmp.unmerge():
        assert model.forward_features(IMAGES).shape == (3, 17, 16)
    model.ltmp.set(None, [0.0, 0.03, 0.0])
    assert_close(logits, run_recorded(model, IMAGES)[0], 1e-6)


def test_a_record_of_no_call_says_so() -> None:
    with ltmp.record() as calls, pytest.raises(ltmp.LTMPError, match="nothing was recorded"):
        calls.share()
