"""Records of the calls of an attached model, and running it without reduction."""

from __future__ import annotations

import ast
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import ltmp
from helpers import attach_reducing, embed, random_images, run_blocks, run_recorded, tiny_vit
from ltmp.hosts.attach import attachment
from ltmp.hosts.sizes import sizes_of

CORE = (
    "config",
    "calls",
    "engines/body",
    "method/policy",
    "method/thresholds",
    "method/rates",
    "method/tokens",
    "method/reduction",
)
"""The modules that define the method, from its settings to the input of an engine; everything else plugs into them."""


@torch.no_grad()
def test_record_collects_every_call() -> None:
    model = attach_reducing(tiny_vit(), random_images(4))
    with ltmp.record() as calls:
        model(random_images(4))
        model(random_images(2, seed=1))
    assert [kept.shape for kept in calls.kept] == [(4, 3), (2, 3)]
    assert calls.share().shape == (6,)
    assert ((calls.share() > 0) & (calls.share() < 1)).all()
    model(random_images(1))
    assert len(calls.kept) == 2


@pytest.mark.parametrize("unmerged", [False, True], ids=["tokens", "grid"])
@pytest.mark.parametrize("reduced", [False, True], ids=["off", "reduced"])
def test_a_call_that_backward_runs_again_is_recorded_once(reduced: bool, unmerged: bool) -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images) if reduced else ltmp.attach(tiny_vit())
    model.set_grad_checkpointing(True)
    with ltmp.record() as calls, ltmp.unmerge() if unmerged else nullcontext():
        model.train()(images).sum().backward()
    assert [len(kept) for kept in calls.kept] == [2]


@torch.no_grad()
def test_records_nest() -> None:
    model = ltmp.attach(tiny_vit())
    with ltmp.record() as outer:
        model(random_images(1))
        with ltmp.record() as inner:
            model(random_images(2))
        model(random_images(3))
    assert [len(kept) for kept in outer.kept] == [1, 3]
    assert [len(kept) for kept in inner.kept] == [2]


@torch.no_grad()
def test_record_and_dense_belong_to_their_thread() -> None:
    images = random_images(2)
    model = attach_reducing(tiny_vit(), images)
    expected, kept = run_recorded(model, images)
    outside: list[object] = []
    with ltmp.record() as calls, ltmp.dense():
        thread = threading.Thread(target=lambda: outside.extend(torch.no_grad()(run_recorded)(model, images)))
        thread.start()
        thread.join()
        assert calls.kept == []
    assert torch.equal(outside[0], expected)
    assert torch.equal(outside[1], kept)


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_dense_is_the_model_without_us(training: bool) -> None:
    images = random_images(3)
    expected = tiny_vit()(images)
    model = attach_reducing(tiny_vit(), images)
    model.ltmp.train(training).requires_grad_(training)
    with ltmp.dense():
        logits, kept = run_recorded(model, images)
    assert torch.equal(logits, expected)
    assert kept.tolist() == [[17.0] * 3] * 3
    assert not torch.equal(model(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["packed", "masked"])
def test_sizes_come_with_the_tokens(masked: bool) -> None:
    images = random_images(3)
    model = attach_reducing(tiny_vit(), images, "ltm")
    model.ltmp.train(masked).requires_grad_(masked)
    x = embed(model, images)
    with ltmp.record() as calls:
        out = run_blocks(model, x)
    size = sizes_of(out)
    assert size is not None
    assert size.shape == out.shape[:2]
    # merging loses no patch
    assert size.sum(1).tolist() == [17.0] * 3
    assert (size > 0).sum(1).tolist() == calls.kept[0][:, -1].tolist()
    with ltmp.dense():
        assert sizes_of(run_blocks(model, x), attachment(model).body) is None
    with pytest.raises(ltmp.LTMPError, match="got lost"):
        sizes_of(out + 0)


@torch.no_grad()
def test_input_is_left_alone() -> None:
    model = attach_reducing(tiny_vit(), random_images(3))
    x = embed(model, random_images(3))
    before = x.clone()
    for masked in (False, True):
        model.ltmp.train(masked).requires_grad_(masked)
        run_blocks(model, x)
        assert torch.equal(x, before)


def code_lines(path: Path) -> int:
    """Number of lines without blanks, comments and docstrings."""
    text = path.read_text()
    tree = ast.parse(text)
    strings = [
        node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    prose = {line for s in strings for line in range(s.lineno, (s.end_lineno or s.lineno) + 1)}
    lines = enumerate(text.splitlines(), 1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and i not in prose for i, line in lines)


def test_the_core_stays_small() -> None:
    package = Path(ltmp.__file__).parent
    sizes = {name: code_lines(package / f"{name}.py") for name in CORE}
    # dial and probe, which were files of their own, are part of the thresholds
    assert sum(sizes.values()) < 870, sizes
