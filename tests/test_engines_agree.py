"""Masked training, packed inference with plans compiled or not, and one image at a time compute the same function."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import ltmp
import reference
from helpers import assert_close, make_probe, plain_torch, random_images, run_blocks, tiny_vit
from ltmp.config import LEARNED, Scores
from ltmp.config import SCORES as NAMED
from ltmp.hosts.sizes import sizes_of
from ltmp.method import scores as method_scores

DEPTH, WIDTH = 3, 16

merge_thresholds = st.lists(st.floats(-0.6, 1.1), min_size=DEPTH, max_size=DEPTH)
# in units of 1/N, the mean of importance
prune_thresholds = st.lists(st.floats(-0.2, 2.0), min_size=DEPTH, max_size=DEPTH)


def prefix_model(protected: int) -> Any:
    if protected == 0:
        return tiny_vit(class_token=False, global_pool="avg")
    return tiny_vit(reg_tokens=protected - 1)


SCORES = [
    *NAMED.values(),
    Scores("heads"),
    Scores(matching="mutual"),
    Scores(size_power=0.5),
    Scores(class_power=0.5),
    Scores("probe"),
    Scores(importance="probe", size_power=0.5),
    Scores("probe", "mutual", class_power=0.5),
    Scores("heads", "mutual", "probe", size_power=0.3, class_power=0.5),
]


FORMS = ["masked", "packed", "compiled"]


def run_body(model: Any, x: Tensor, form: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Return the live rows of each image, the counts [B, L], and the size of each live row."""
    model.ltmp.train(form == "masked").requires_grad_(form == "masked")
    with torch.no_grad(), ltmp.record() as calls, plain_torch() if form == "packed" else nullcontext():
        out = run_blocks(model, x)
    size = sizes_of(out)
    size = torch.ones(out.shape[:2]) if size is None else size
    return [row[n > 0] for row, n in zip(out, size, strict=True)], torch.cat(calls.kept), [n[n > 0] for n in size]


@settings(max_examples=60)
@given(
    images=st.integers(1, 4),
    patches=st.integers(1, 20),
    protected=st.sampled_from([0, 1, 2, 5]),
    variant=st.sampled_from(sorted(LEARNED)),
    scores=st.sampled_from(SCORES),
    merge=merge_thresholds,
    prune=prune_thresholds,
    seed=st.integers(0, 10_000),
)
def test_any_tokens_any_thresholds(
    images: int, patches: int, protected: int, variant: str, scores: Scores, merge: list[float],
    prune: list[float], seed: int,
) -> None:  # fmt: skip
    if protected == 0:
        # there is no class token
        scores = replace(scores, class_power=0.0)
    config = ltmp.LTMPConfig(variant, scores)
    model = prefix_model(protected)
    tokens = patches + protected
    x = torch.randn(images, tokens, WIDTH, generator=torch.Generator().manual_seed(seed))
    merge, prune = torch.tensor(merge).tolist(), (torch.tensor(prune) / tokens).tolist()
    probe = make_probe(DEPTH, WIDTH, seed=seed) if config.needs_probe else None
    alone = [reference.OneImage(model, row, protected, config, probe) for row in x]
    expected = [reference.run(image, merge, prune, variant) for image in alone]
    # rounding may decide what lies this close to its threshold, or a tie between two partners
    assume(min(image.margin for image, _ in expected) > 1e-4 / tokens)

    ltmp.attach(model, config)
    model.ltmp.set(merge, prune)
    model.ltmp.set_probe(probe)
    counts = [counts for _, counts in expected]
    for form, parts in product(FORMS, (x[None], x[:, None])):
        found = [run_body(model, part, form) for part in parts]
        assert torch.cat([kept for _, kept, _ in found]).tolist() == counts
        rows, sizes = ([row for part in found for row in part[k]] for k in (0, 2))
        for (image, _), row, size in zip(expected, rows, sizes, strict=True):
            order = image.prefix_first()
            assert size.tolist() == [token.size for token in order]
            assert_close(row, torch.stack([token.x for token in order]), atol=1e-5 * max(1.0, float(row.abs().max())))


@pytest.mark.parametrize("variant", LEARNED)
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_shortest_images(tokens: int, variant: str) -> None:
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig(variant=variant))
    model.ltmp.set([-2.0] * DEPTH, [10.0] * DEPTH)
    x = torch.randn(2, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens))
    masked, *others = (run_body(model, x, form) for form in FORMS)
    for other in others:
        assert other[1].tolist() == masked[1].tolist()
        for a, b in zip(other[0], masked[0], strict=True):
            assert_close(a, b, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_equal_tokens(form: str) -> None:
    """Every cosine is 1 and all tokens are equally important: even tokens merge, and the mean changes nothing."""
    model = ltmp.attach(tiny_vit())
    x = torch.ones(2, 9, WIDTH)
    model.ltmp.set([0.5] * DEPTH, [0.0] * DEPTH)
    rows, kept, sizes = run_body(model, x, form)
    # of eight patches, the four at odd places stay; then two of these, then one
    assert kept.tolist() == [[5.0, 3.0, 2.0]] * 2
    assert sizes[0].tolist() == [1.0, 8.0]
    assert_close(rows[0][1], rows[0][0], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protected", [0, 1, 2, 5])
def test_everything_pruned_leaves_the_prefix(protected: int, form: str) -> None:
    """Without a prefix the most important token stays: an image is never empty."""
    model = ltmp.attach(prefix_model(protected))
    model.ltmp.set(None, [0.0, 10.0, 0.0])
    x = torch.randn(3, 12, WIDTH, generator=torch.Generator().manual_seed(0))
    rows, kept, _ = run_body(model, x, form)
    left = max(protected, 1)
    assert kept.tolist() == [[12.0, left, left]] * 3
    assert all(row.isfinite().all() for row in rows)


@pytest.mark.parametrize("engine", ["packed", "triton"])
def test_scores_without_kernels_run_in_plain_torch(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = method_scores.importance

    def importance(policy: Any, block: int, signals: Any) -> Tensor | None:
        """Later patches are more important."""
        if policy.config.scores.importance == "place":
            return signals.tokens.origin.float()
        return known(policy, block, signals)

    monkeypatch.setattr("ltmp.config.IMPORTANCES", ("received", "probe", "place"))
    monkeypatch.setattr(method_scores, "importance", importance)
    monkeypatch.setattr("ltmp.engines.select.unavailable", lambda device: None)
    model = ltmp.attach(tiny_vit(), ltmp.LTMPConfig("ltp", Scores(importance="place"), engine=engine))
    model.ltmp.set(prune=[5.0] * model.ltmp.depth)
    with torch.no_grad(), ltmp.trace() as traces:
        model(random_images(2))
    gone = traces.sources[0] < 0
    assert gone[:, 1:6].all()
    assert not gone[:, 0].any()
    assert not gone[:, 6:].any()
