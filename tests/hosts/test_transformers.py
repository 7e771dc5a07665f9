"""What only hosts of transformers do: heads that pool in their own code, recorded outputs, pipelines; versions 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, clips, pixels, pixels_and_texts, tiny_hf
from PIL import Image
from torch import Tensor, nn

import ltmp
from helpers import assert_close, random_images, run_blocks
from ltmp.evaluate import evaluate

transformers = pytest.importorskip("transformers")

MERGE, PRUNE = [0.6, 0.5, 0.7], [0.03, 0.02, 0.04]


def reducing(model: Any) -> Any:
    ltmp.attach(model).ltmp.set(MERGE, PRUNE)
    return model


def vit(**kwargs: Any) -> Any:
    return tiny_hf("ViTForImageClassification", "ViTConfig", **kwargs)


def live(x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each image the tokens that are left [n, C], prefix first, and how many patches each stands for [n]."""
    return [(row[size > 0], size[size > 0]) for row, size in zip(x, x.ltmp_size, strict=True)]


# -- heads


MEANS = {
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", "dinov2", 1, True),
    "registers": (
        "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", "dinov2_with_registers", 5, True,
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", "vision_model", 1, False),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", "vision_model", 0, False),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_heads_average_patches_by_size(name: str, masked: bool) -> None:
    """The encoder alone says what is left and how large it is; the head's average is written down again."""
    cls, config, encoder, prefix, with_class = MEANS[name]
    model, twin = (tiny_hf(cls, config) for _ in range(2))
    reducing(model).ltmp.train(masked).requires_grad_(masked)
    bare = reducing(getattr(twin, encoder))
    tokens = live(bare(**pixels(bare)).last_hidden_state)
    assert len({len(size) for _, size in tokens}) > 1, "all images lost as many: dead rows are not tested"
    assert max(float(size.max()) for _, size in tokens) > 1
    pooled = []
    for x, size in tokens:
        mean = sum(w * t for w, t in zip(size[prefix:], x[prefix:], strict=True)) / size[prefix:].sum()
        pooled.append(torch.cat([x[0], mean]) if with_class else mean)
    assert_close(model(**pixels(model)).logits, model.classifier(torch.stack(pooled)), atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_attention_pooling_counts_a_token_as_often_as_it_has_patches(masked: bool) -> None:
    model = reducing(tiny_hf("SiglipVisionModel", "SiglipVisionConfig"))
    model.ltmp.train(masked).requires_grad_(masked)
    output = model(**pixels(model))
    repeated = [x.repeat_interleave(size.long(), 0) for x, size in live(output.last_hidden_state)]
    ltmp.detach(model)
    inner = getattr(model, "vision_model", model)
    expected = torch.cat([inner.head(x[None]) for x in repeated])
    assert_close(output.pooler_output, expected, atol=1e-5)


@torch.no_grad()
def test_image_text_similarity_reduces_the_images_alone() -> None:
    model = tiny_hf("CLIPModel", "CLIPConfig")
    inputs = pixels_and_texts(model)
    dense = model(**inputs)
    reducing(model)
    texts = list(model.text_model.encoder.layers)
    output = model(**inputs)
    assert len(texts) == len(model.text_model.encoder.layers) == 3
    assert torch.equal(output.text_embeds, dense.text_embeds)
    assert not torch.allclose(output.image_embeds, dense.image_embeds, atol=1e-3)
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert_close(nn.functional.normalize(features, dim=-1), output.image_embeds, atol=1e-6)


@torch.no_grad()
def test_videos_of_the_usual_size() -> None:
    """Sixteen frames of 224 pixels are 1,568 tokens without a class token."""
    kwargs = {"num_frames": 16, "tubelet_size": 2, "image_size": 224, "patch_size": 16, "num_hidden_layers": 2}
    model = tiny_hf("VideoMAEForVideoClassification", "VideoMAEConfig", **kwargs)
    ltmp.attach(model).ltmp.set([0.6, 0.6], [3e-4, 3e-4])
    with ltmp.record() as calls:
        output = model(torch.stack([random_images(16, size=224)]))
    assert output.logits.isfinite().all()
    assert calls.geometry[0].tokens == 1568
    assert calls.kept[0][0, -1] < 1500


@torch.no_grad()
def test_vit_mae_pairs_the_same_patches_in_each_call() -> None:
    model = reducing(tiny_hf("ViTMAEModel", "ViTMAEConfig"))
    first, second = (model(**pixels(model)).last_hidden_state for _ in range(2))
    assert torch.equal(first, second)


def test_a_head_that_reads_the_first_patch_is_refused() -> None:
    model = tiny_hf("VideoMAEForVideoClassification", "VideoMAEConfig", use_mean_pooling=False)
    with pytest.raises(ltmp.LTMPError, match="first patch"):
        ltmp.attach(model)
    ltmp.attach(model.videomae)


# -- what is asked of a call


RECORDS = (
    "hf-vit", "hf-deit", "hf-dinov2", "hf-dinov3", "hf-clip-projection", "hf-siglip-classes", "hf-vit-mae",
    "hf-videomae",
)  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("how", ["keyword", "config"])
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
@pytest.mark.parametrize("name", RECORDS)
def test_hidden_states_are_whole_or_refused(name: str, masked: bool, how: str) -> None:
    model = CASES[name].build()
    inputs = dict(CASES[name].inputs(model))
    if how == "keyword":
        inputs["output_hidden_states"] = True
    else:
        for module in model.modules():
            if hasattr(module, "config"):
                module.config.output_hidden_states = True
    whole = model(**inputs).hidden_states
    assert len(whole) == 4
    # transformers leaves its recording hooks on the blocks, which must not be taken for someone's
    reducing(model).ltmp.train(masked).requires_grad_(masked)
    with pytest.raises(NotImplementedError, match=r"output_hidden_states.*ltmp\.dense\(\).*ltmp\.detach\(model\)"):
        model(**inputs)
    with ltmp.dense():
        again = model(**inputs).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    ltmp.detach(model)
    assert all(torch.equal(a, b) for a, b in zip(whole, model(**inputs).hidden_states, strict=True))


@torch.no_grad()
def test_attentions_are_whole_or_refused() -> None:
    model = vit(attn_implementation="eager")
    inputs = {**pixels(model), "output_attentions": True}
    whole = model(**inputs).attentions
    assert len(whole) == 3
    reducing(model)
    with pytest.raises(NotImplementedError, match="output_attentions"):
        model(**inputs)
    model.ltmp.set([1.0] * 3, [0.0] * 3)
    off = model(**inputs).attentions
    assert all(torch.equal(a, b) for a, b in zip(whole, off, strict=True))


@torch.no_grad()
def test_masks_that_hide_nothing_are_taken() -> None:
    model = reducing(vit())
    expected = model(**pixels(model)).logits
    with pytest.raises(NotImplementedError, match="attention_mask"):
        model.vit(**pixels(model), attention_mask=torch.tensor([[1] * 16 + [0]] * 3))
    ones = torch.ones(3, 17, dtype=torch.long)
    model.vit(**pixels(model), attention_mask=ones)
    # what some hosts give their blocks while they are exported
    x = model.vit.embeddings(pixels(model)["pixel_values"])
    hidden = run_blocks(model, x, torch.ones(3, 1, 17, 17, dtype=torch.bool))
    assert_close(model.classifier(model.vit.layernorm(hidden)[:, 0]), expected, atol=1e-6)


def test_losses_and_a_trainers_arguments() -> None:
    model = reducing(vit()).train()
    model.ltmp.requires_grad_()
    labels = torch.tensor([0, 1, 2])
    model(**pixels(model), labels=labels, num_items_in_batch=torch.tensor(3)).loss.backward()
    assert model.ltmp.merge.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("how", ["eager", "sdpa"])
def test_attention_implementations_reduce_alike(how: str) -> None:
    model, other = reducing(vit(attn_implementation=how)), reducing(vit())
    assert_close(model(**pixels(model)).logits, other(**pixels(other)).logits, atol=1e-6)


@torch.no_grad()
def test_tuples() -> None:
    model = reducing(vit())
    assert torch.equal(model(**pixels(model), return_dict=False)[0], model(**pixels(model)).logits)


@torch.no_grad()
def test_pipeline() -> None:
    model = vit()
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    pipe = transformers.pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    noise = np.random.default_rng(0)
    images = [Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)) for _ in range(3)]
    dense = pipe(images, top_k=5)
    reducing(model)
    with ltmp.record() as calls:
        reduced = pipe(images, top_k=5, batch_size=3)
    assert [len(answer) for answer in reduced] == [5, 5, 5]
    assert reduced != dense
    assert torch.cat(calls.kept)[:, -1].lt(17).all()
    singly = pipe(images, top_k=5)
    for a, b in zip(reduced, singly, strict=True):
        assert [x["label"] for x in a] == [x["label"] for x in b]
        assert [x["score"] for x in a] == pytest.approx([x["score"] for x in b], abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hf-vit-bare", "hf-dinov2-bare", "hf-dinov3", "hf-clip-vision", "hf-siglip-vision"])
def test_unmerged_tokens_cover_the_grid(name: str) -> None:
    model = CASES[name].build()
    dense = model(**pixels(model)).last_hidden_state
    reducing(model)
    reduced = model(**pixels(model))
    with ltmp.unmerge():
        whole = model(**pixels(model))
        between = model(**pixels(model), output_hidden_states=True).hidden_states
    assert [x.shape for x in between] == [dense.shape] * 4
    assert reduced.last_hidden_state.shape[1] < whole.last_hidden_state.shape[1] == dense.shape[1]
    if "siglip" not in name:
        assert_close(whole.pooler_output, reduced.pooler_output, atol=1e-5)


class ZeroShot(nn.Module):
    """A classifier whose classes are texts, as docs/transformers.md has it."""

    def __init__(self, clip: Any, texts: Tensor) -> None:
        super().__init__()
        self.clip = clip
        with torch.no_grad():
            self.register_buffer("texts", nn.functional.normalize(clip.get_text_features(texts).pooler_output, dim=-1))

    def forward(self, images: Tensor) -> Tensor:
        features = nn.functional.normalize(self.clip.get_image_features(images).pooler_output, dim=-1)
        return self.clip.logit_scale.exp() * features @ self.texts.T


def test_classes_may_be_texts() -> None:
    clip = tiny_hf("CLIPModel", "CLIPConfig")
    model = ltmp.attach(ZeroShot(clip, pixels_and_texts(clip)["input_ids"]).eval())
    batches = [(_images(seed), torch.full((6,), -1)) for seed in range(4)]
    result = ltmp.learn(model, batches, 0.75, views=12, calibration=12, distill=True)
    assert abs(result.share - 0.75) < 0.1
    assert evaluate(model, batches, speed=False).agreement > 50


# -- blocks


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter beside it, as PEFT wraps them."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.low = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.low(x)


@torch.no_grad()
def test_adapted_layers_attach() -> None:
    model = tiny_hf("CLIPVisionModel", "CLIPVisionConfig")
    for name, module in list(model.named_modules()):
        if name.endswith("q_proj"):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.q_proj = Adapted(module)
    dense = model(**pixels(model)).pooler_output
    ltmp.attach(model)
    assert torch.equal(model(**pixels(model)).pooler_output, dense)
    model.ltmp.train().requires_grad_()
    assert_close(model(**pixels(model)).pooler_output, dense, atol=1e-5)
    model.ltmp.eval().set(MERGE, PRUNE)
    assert model(**pixels(model)).pooler_output.isfinite().all()


def first(model: Any) -> Any:
    return next(module for module in model.modules() if type(module).__name__ == "ViTLayer")


def replaced(model: Any) -> None:
    first(model).mlp = nn.Sequential(nn.Linear(32, 32))


def extended(model: Any) -> None:
    first(model).gate = nn.Linear(32, 32)


def hooked(model: Any) -> None:
    first(model).attention.register_forward_hook(lambda *_: None)


def offloaded(model: Any) -> None:
    first(model).forward = lambda *_: None


def foreign(model: Any) -> None:
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks[0] = nn.Sequential(blocks[0])


TROUBLE: dict[str, tuple[Callable[[Any], None], str]] = {
    "another-mlp": (replaced, "Sequential|parts that this version of ltmp does not support"),
    "another-part": (extended, "parts that this version of ltmp does not support"),
    "hooks": (hooked, "forward hooks"),
    "own-forward": (offloaded, "a forward of its own"),
    "foreign": (foreign, "is a Sequential, not a layer of transformers"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_blocks_that_are_not_as_known_are_refused(name: str) -> None:
    change, reason = TROUBLE[name]
    model = vit()
    change(model)
    with pytest.raises(ltmp.LTMPError, match=reason) as refusal:
        ltmp.attach(model)
    assert "\n" not in str(refusal.value)
    assert not hasattr(model, "ltmp")


def test_attention_dropout_is_refused() -> None:
    with pytest.raises(ltmp.LTMPError, match=r"attention dropout 0\.1"):
        ltmp.attach(vit(attention_probs_dropout_prob=0.1))


# -- files, learning, evaluation


def test_thresholds_are_bound_to_the_encoder(tmp_path: Any) -> None:
    """They fit any head of the same encoder, and no other width or kind."""
    path = tmp_path / "thresholds.safetensors"
    ltmp.save(reducing(tiny_hf("CLIPVisionModel", "CLIPVisionConfig")), path)
    about = ltmp.checkpoint.read(path).metadata
    assert (about["width"], about["depth"], about["input_size"]) == (32, 3, [16, 16])
    ltmp.load(tiny_hf("CLIPModel", "CLIPConfig"), path)
    with pytest.raises(ltmp.LTMPError, match="architecture"):
        ltmp.load(tiny_hf("SiglipVisionModel", "SiglipVisionConfig"), path)
    with pytest.raises(ltmp.LTMPError, match="width"):
        ltmp.load(tiny_hf("CLIPVisionModel", "CLIPVisionConfig", hidden_size=64), path)


@pytest.mark.parametrize("name", ["hf-vit", "hf-dinov2", "hf-siglip-classes", "hf-videomae"])
def test_learns_and_evaluates(name: str) -> None:
    model = CASES[name].build()
    make = (lambda seed: clips(model)["pixel_values"]) if name == "hf-videomae" else _images
    images = torch.cat([make(seed) for seed in range(6)])
    with torch.no_grad():
        labels = model(images).logits.argmax(-1)
    batches = list(zip(images.split(6), labels.split(6), strict=True))
    ltmp.attach(model)
    result = ltmp.learn(model, batches, 0.75, views=24, calibration=12, distill=True)
    assert abs(result.share - 0.75) < 0.1
    measured = evaluate(model, batches, speed=True)
    assert measured.dense_top1 == 100
    assert measured.share < 0.9


def _images(seed: int) -> Tensor:
    return random_images(6, seed=seed)
