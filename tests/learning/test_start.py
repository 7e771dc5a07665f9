"""Where a run starts: a model's own images settle what merged tokens count as, and whether pruning pays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ltmp
from helpers import random_images, tiny_vit
from ltmp.config import SCORES, Scores
from ltmp.learning.schedule import NEVER

PATCH = 4
SETTINGS = {"knots": 3, "views": 0, "calibration": 24, "checked": 0}


def repeating(images: int = 24) -> Tensor:
    """Images [B, 3, 32, 32], each a repetition of a few patches."""
    few = random_images(images, size=2 * PATCH)
    return few.repeat(1, 1, 4, 4)


def without_places(**settings: object) -> nn.Module:
    """A model without positions: merging equal patches changes nothing, if they count as many as they were."""
    model = tiny_vit(depth=4, img_size=32, patch_size=PATCH, **settings)
    nn.init.zeros_(model.pos_embed)
    return model


@pytest.mark.parametrize("scores", ["best", "attention"])
def test_equal_patches_count_as_they_did_and_are_not_pruned(scores: str, tmp_path: Path) -> None:
    model, images = ltmp.attach(without_places(), ltmp.LTMPConfig(scores=scores)), repeating()
    result = ltmp.learn_dial(model, images.split(8), 0.6, 0.9, **SETTINGS)
    assert SCORES[scores].size_power < model.ltmp.config.scores.size_power == 1
    assert all(shape.prune_level == NEVER for shape in result.shapes.values())
    assert max(result.divergence) < 1e-3
    assert str(model.ltmp.config.scores) == f"{scores}, size_power=1"
    # a model attached with the name of the scores loads what the images settled
    ltmp.save(model, tmp_path / "dial.safetensors")
    other = without_places()
    other.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("ltmp.")})
    ltmp.attach(other, ltmp.LTMPConfig(scores=scores))
    ltmp.load(other, tmp_path / "dial.safetensors")
    with torch.inference_mode():
        assert torch.equal(other(images), model(images))


def test_learning_starts_from_what_fits() -> None:
    model, images = ltmp.attach(without_places(), ltmp.LTMPConfig(scores="best")), repeating()
    ltmp.learn(model, images.split(8), 0.7, views=0, calibration=24)
    assert model.ltmp.config.scores.size_power == 1
    # the last block's patches are read by nobody
    assert model.ltmp.prune[:-1].tolist() == [0, 0, 0]


def test_scores_of_ones_own_mean_what_they_say() -> None:
    scores = Scores("heads", "mutual", size_power=0.4)
    model = ltmp.attach(without_places(), ltmp.LTMPConfig(scores=scores))
    ltmp.learn_dial(model, repeating().split(8), 0.6, 0.9, **SETTINGS)
    assert model.ltmp.config.scores == scores


def test_pruning_stays_where_it_is_all_there_is() -> None:
    model = ltmp.attach(without_places(), ltmp.LTMPConfig(variant="ltp"))
    result = ltmp.learn_dial(model, repeating().split(8), 0.6, 0.9, **SETTINGS)
    assert all(shape.prune_level > NEVER for shape in result.shapes.values())
    assert result.views == 24 * (1 + 3 + 3)
