"""Thresholds are learned from any kind of answers: features, maps, depth, boxes, or the next token of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from towers import ATTACHED, IMAGE, VISION, images

import ltmp
from helpers import random_images, tiny_vit
from ltmp.errors import LTMPError, UsageError
from ltmp.hosts.attach import thresholds_of
from ltmp.hosts.outputs import answers_in
from ltmp.learning import learn_probe
from ltmp.learning.answers import Judge, dense_answers
from ltmp.learning.batches import first_images, unpack

BEST = ltmp.LTMPConfig(scores="best")


def pictures(count: int = 32, size: int = 16) -> list[Any]:
    return [images(8, size, seed=seed) for seed in range(count // 8)]


def asking(placeholders: int) -> list[Any]:
    """As a processor returns them: two texts, each about one picture."""
    text = torch.tensor([[5, *[IMAGE] * placeholders, 6, 7]] * 8)
    mask = torch.ones_like(text)
    return [{"pixel_values": batch, "input_ids": text, "attention_mask": mask} for batch in pictures()]


def cut_up() -> list[Any]:
    """As Qwen's processor cuts pictures of one size up: a row a patch."""
    draw = torch.Generator().manual_seed(0)
    text = torch.tensor([[5, 44, *[IMAGE] * 8, 45, 6, 7]] * 4)
    grid = torch.tensor([[1, 4, 8]] * 4)
    return [
        {"pixel_values": torch.randn(4 * 32, 96, generator=draw), "image_grid_thw": grid, "input_ids": text,
         "mm_token_type_ids": (text == IMAGE).int()}
        for _ in range(8)
    ]  # fmt: skip


def described() -> list[Any]:
    text = torch.randint(3, 48, (8, 6), generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": batch, "input_ids": text} for batch in pictures()]


def padded() -> list[Any]:
    there = torch.tensor([[1] * 16, [1] * 12 + [0] * 4] * 4)
    sizes = torch.tensor([[4, 4], [3, 4]] * 4)
    draw = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(8, 16, 48, generator=draw) * there[..., None], "pixel_attention_mask": there,
         "spatial_shapes": sizes}
        for _ in range(4)
    ]  # fmt: skip


def tower(name: str) -> Callable[[], nn.Module]:
    return lambda: ATTACHED[name].build()


def features_only() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=16, patch_size=4, depth=4, embed_dim=32, num_heads=2,
        out_indices=(1, 3),
    ).eval()  # fmt: skip


def encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION)).eval()


HOSTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], str]] = {
    "depth": (tower("DepthAnythingForDepthEstimation"), pictures, "gaussian"),
    "feature maps": (tower("Dinov2Backbone"), pictures, "gaussian"),
    "maps of timm": (features_only, pictures, "gaussian"),
    "embeddings": (lambda: tiny_vit(num_classes=0), pictures, "gaussian"),
    "tokens of an encoder": (encoder, pictures, "gaussian"),
    "boxes": (tower("YolosForObjectDetection"), pictures, "gaussian"),
    "padded patches": (tower("Siglip2VisionModel"), padded, "gaussian"),
    "next token": (tower("LlavaForConditionalGeneration"), lambda: asking(16), "categorical"),
    "next token, patches in rows": (tower("Qwen3VLForConditionalGeneration"), cut_up, "categorical"),
}


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> tuple[nn.Module, list[Any], str]:
    pytest.importorskip("transformers")
    build, batches, kind = HOSTS[request.param]
    return build(), batches(), kind


def deployed_share(model: nn.Module, batches: list[Any]) -> float:
    with torch.inference_mode(), ltmp.record() as calls:
        for inputs, _ in map(unpack, batches):
            model(inputs) if isinstance(inputs, Tensor) else model(**inputs.tensors)
    return float(calls.share().mean())


def test_the_budget_is_met_without_labels(host: tuple[nn.Module, list[Any], str]) -> None:
    model, batches, kind = host
    ltmp.attach(model, BEST)
    result = ltmp.learn(model, batches, 0.75, views=16, calibration=16, seed=0)
    assert result.distribution == kind
    assert len(result.history) == 16 // len(unpack(batches[0])[0])
    assert all(step.loss > 0 for step in result.history)
    assert result.share == pytest.approx(0.75, abs=0.04)
    assert deployed_share(model, batches) == pytest.approx(0.75, abs=0.08)


def test_a_dial_is_made_of_them(host: tuple[nn.Module, list[Any], str]) -> None:
    model, batches, kind = host
    ltmp.attach(model, BEST)
    result = ltmp.learn_dial(model, batches, 0.65, 0.9, knots=3, views=0, calibration=16)
    assert result.distribution == kind
    assert all(value > 0 for value in result.divergence)
    model.ltmp.set_budget(0.7)
    assert deployed_share(model, batches) < 0.8


def test_fewer_tokens_and_a_grid_learn_from_the_same_answers() -> None:
    pytest.importorskip("transformers")
    models = [ATTACHED["LlavaForConditionalGeneration"].build() for _ in range(2)]
    for model, form in zip(models, ("grid", "fewer"), strict=True):
        ltmp.attach(model, ltmp.LTMPConfig(tokens=form))
        assert ltmp.learn(model, asking(16), 0.75, views=0, calibration=16).share == pytest.approx(0.75, abs=0.04)
    inputs, _ = first_images(asking(16), 8)
    answers = [dense_answers(model, inputs, Judge.of(model, inputs)) for model in models]
    assert answers[0].shape == (8, 60)
    assert torch.allclose(*answers, atol=1e-6)


def test_numbers_count_relative_to_how_much_they_vary() -> None:
    gaussian, theirs = Judge("gaussian"), random_images(3)
    assert torch.allclose(
        gaussian.divergence(theirs + 0.1 * theirs.std((1, 2, 3), correction=0)[:, None, None, None], theirs),
        torch.full((3,), 0.005),
    )
    assert torch.allclose(gaussian.divergence(7 * theirs, 7.7 * theirs), gaussian.divergence(theirs, 1.1 * theirs))
    assert gaussian.divergence(theirs, theirs).eq(0).all()


def test_what_is_read_of_an_output() -> None:
    maps = [torch.rand(2, 3, 4, 4), torch.rand(2, 5, 2, 2)]
    assert answers_in(maps).flatten(1).tolist() == torch.cat([m.flatten(1) for m in maps], 1).tolist()
    assert answers_in({"last_hidden_state": maps[0], "logits": maps[1]}) is maps[1]
    assert answers_in(torch.rand(4)).shape == (4, 1)
    with pytest.raises(
        LTMPError, match="returned a dict without an answer: expected a tensor, feature maps, or an obj"
    ):
        answers_in({"loss": torch.rand(())})


def test_a_loss_of_ones_own() -> None:
    seen = []

    def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
        seen.append((ours.shape, theirs.shape))
        return 1 - F.cosine_similarity(ours, theirs)

    model = ltmp.attach(tiny_vit(num_classes=0))
    result = ltmp.learn(model, pictures(), 0.75, views=16, calibration=16, loss=cosine)
    assert result.share == pytest.approx(0.75, abs=0.04)
    assert {shapes[0][1:] for shapes in seen} == {(model.embed_dim,)}
    assert all(ours == theirs for ours, theirs in seen)
    # labels have nothing to do with it
    labelled = [(batch, torch.full((8,), 99)) for batch in pictures()]
    ltmp.learn(ltmp.attach(tiny_vit()), labelled, 0.75, views=8, calibration=8, loss=cosine)
    ltmp.learn_dial(ltmp.attach(tiny_vit()), pictures(), 0.7, 0.9, knots=2, views=0, calibration=8, loss=cosine)
    with pytest.raises(LTMPError, match=r"loss= gave \[\]: expected a tensor of one number for each of the 8 images"):
        ltmp.learn(model, pictures(), 0.75, views=8, calibration=8, loss=lambda a, b: (a - b).mean())


def test_a_run_of_another_loss_is_not_gone_on_with(tmp_path: Any) -> None:
    settings = {"views": 16, "calibration": 16, "checkpoint": tmp_path / "run.pt"}
    ltmp.learn(ltmp.attach(tiny_vit(num_classes=0)), pictures(), 0.75, **settings)
    with pytest.raises(LTMPError, match="loss"):
        ltmp.learn(ltmp.attach(tiny_vit(num_classes=0)), pictures(), 0.75, loss=torch.dist, **settings)


def test_directions_of_numbers_are_drawn_alike() -> None:
    probes = []
    for _ in range(2):
        model = ltmp.attach(tiny_vit(num_classes=0), BEST)
        state = torch.get_rng_state()
        learn_probe(model, random_images(20))
        probes.append(thresholds_of(model).probe)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*probes)


TEXT = torch.tensor([[5, *[IMAGE] * 16, 6, 7]] * 2)
REFUSED: dict[str, tuple[list[Any], str]] = {
    "padded on the right": (
        [{"pixel_values": images(), "input_ids": TEXT, "attention_mask": torch.tensor([[1] * 19, [1] * 18 + [0]])}],
        "texts are padded on the right, .* padding_side='left'",
    ),
    "texts of several lengths": (
        [{"pixel_values": images(), "input_ids": TEXT}, {"pixel_values": images(), "input_ids": TEXT[:, 1:]}],
        r"batches differ in shape: pad texts to one length \(padding='max_length'\)",
    ),
    "grids of several sizes": (
        [{"pixel_values": torch.rand(48, 96), "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 8]])}],
        r"several sizes \(image_grid_thw\): resize them to one size",
    ),
    "rows that no image owns": (
        [{"pixel_values": torch.rand(31, 96), "input_ids": TEXT}],
        "pixel_values has 31 rows for 2 images: expected as many rows for each",
    ),
}


@pytest.mark.parametrize("batches", REFUSED)
def test_batches_that_cannot_be_cut_are_refused(batches: str) -> None:
    given, sentence = REFUSED[batches]
    with pytest.raises(LTMPError, match=sentence):
        ltmp.learn(ltmp.attach(tiny_vit()), given, 0.75, views=0, calibration=4)


def test_hosts_that_compute_no_gradients_have_a_dial() -> None:
    pytest.importorskip("transformers")
    model = ATTACHED["CLIPSegForImageSegmentation"].build()
    with pytest.raises(LTMPError, match=r"runs its blocks without gradients.* attach with others, such as 'attention'"):
        ltmp.learn_dial(ltmp.attach(model, BEST), described(), 0.65, 0.9, knots=2, views=0, calibration=16)
    ltmp.attach(model, ltmp.LTMPConfig(scores="attention"))
    assert ltmp.learn_dial(model, described(), 0.65, 0.9, knots=2, views=0, calibration=16).distribution == "gaussian"
    with pytest.raises(LTMPError, match=r"runs its blocks without gradients.*: learn with views=0, or a dial"):
        ltmp.learn(model, described(), 0.75, views=16, calibration=16)
    assert ltmp.learn(model, described(), 0.75, views=0, calibration=16).share == pytest.approx(0.75, abs=0.04)


def test_the_papers_recipe_needs_classes() -> None:
    with pytest.raises(UsageError, match="the paper's recipe learns from labels of classes"):
        ltmp.learn(ltmp.attach(tiny_vit(num_classes=0)), pictures(), 0.75, views=8, calibration=8, recipe="paper")
