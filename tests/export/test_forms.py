"""Each exported form equals the reference for any tokens and thresholds, tested in eager mode, which is fast."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.eva import Eva

import ltmp
from helpers import TINY, assert_close, attach_reducing, liven, make_probe, random_images, run_recorded, tiny_vit
from ltmp.config import SCORES as NAMED
from ltmp.config import Scores
from ltmp.engines.body import running
from ltmp.export.forms import Form
from ltmp.export.layouts import FORMS
from ltmp.hosts.attach import attachment, thresholds_of

DEPTH = 3
RTOL = 1e-5  # of the largest logit: float32, summed in another order
VARIANTS = ("ltmp", "ltpm", "ltm", "ltp")
HOSTS: dict[str, Callable[[], Any]] = {
    "class token": tiny_vit,
    "no class token": partial(tiny_vit, class_token=False, global_pool="avg"),
    "registers": partial(tiny_vit, reg_tokens=4),
    "registers, pooled": partial(tiny_vit, reg_tokens=2, global_pool="avg"),
    "attention pooling": partial(tiny_vit, global_pool="map"),
    "query-key norm": partial(tiny_vit, qk_norm=True, init_values=0.5),
}
SCORES = [
    *NAMED.values(),
    Scores(matching="mutual"),
    Scores(size_power=0.5),
    Scores(class_power=0.5),
    Scores("probe", class_power=0.5),
    Scores("heads", "mutual", class_power=0.2),
]


def rotary() -> Any:
    return liven(Eva(**{**TINY, "embed_dim": 32}, use_rot_pos_emb=True, use_abs_pos_emb=False)).eval()


def run_form(model: Any, images: torch.Tensor, form: str) -> tuple[torch.Tensor, torch.Tensor]:
    thresholds = thresholds_of(model)
    engine = Form(
        FORMS[form], attachment(model).body.active(), tuple(thresholds.merge.tolist()), tuple(thresholds.prune.tolist())
    )
    with running(engine), torch.no_grad():
        return run_recorded(model, images)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_host_and_variant(form, host, variant):
    images = random_images(1 if form == "single" else 5, seed=3)
    model = attach_reducing(HOSTS[host](), images, variant)
    with torch.no_grad():
        logits, kept = run_recorded(model, images)
    actual, counts = run_form(model, images, form)
    assert kept[:, -1].max() < kept[:, 0].max()
    assert torch.equal(counts, kept)
    assert_close(actual, logits, RTOL * max(1.0, logits.abs().max().item()), "logits")


@pytest.mark.parametrize("form", [form for form in FORMS if form != "single"])
@given(kept=st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_places_without_a_token_hold_one_of_their_image(form, kept):
    # their attention bias is finite, and hides them only beside a token of their own image
    keep = torch.tensor(kept)
    keep[:, 0] = True
    source, layout = FORMS[form](keep, keep.shape[1])
    shown = layout.pad(source)
    assert layout.live is not None
    assert torch.equal(layout.live.sum(1), keep.sum(1))
    assert keep.flatten()[shown].all()
    assert torch.equal(shown // keep.shape[1], torch.arange(len(keep))[:, None].expand_as(shown))


@settings(max_examples=80)
@given(
    form=st.sampled_from(sorted(FORMS)),
    host=st.sampled_from([*HOSTS.values(), rotary]),
    variant=st.sampled_from(VARIANTS),
    scores=st.sampled_from(SCORES),
    merge=st.lists(st.floats(-0.6, 1.1), min_size=DEPTH, max_size=DEPTH),
    # in units of 1/N, the mean of importance; above 1 is all
    prune=st.lists(st.one_of(st.floats(-0.2, 2.0), st.just(100.0)), min_size=DEPTH, max_size=DEPTH),
    seed=st.integers(0, 1000),
)
def test_any_thresholds(form, host, variant, scores, merge, prune, seed):
    images = random_images(1 if form == "single" else 3, seed=seed)
    model = host()
    if ltmp.LTMPConfig(scores=scores).needs_class_attention and not getattr(
        model, "has_class_token", model.num_prefix_tokens
    ):
        scores = Scores(matching="mutual")
    ltmp.attach(model, ltmp.LTMPConfig(variant, scores))
    thresholds_of(model).set(merge, (torch.tensor(prune) / 17).tolist())
    if thresholds_of(model).config.needs_probe:
        thresholds_of(model).set_probe(make_probe(DEPTH, model.embed_dim, seed=seed))
    with torch.no_grad():
        logits, kept = run_recorded(model, images)
    if not any(map(any, attachment(model).body.active())):
        return
    actual, counts = run_form(model, images, form)
    assert torch.equal(counts, kept)
    assert_close(actual, logits, RTOL * max(1.0, logits.abs().max().item()), "logits")
