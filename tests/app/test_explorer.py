"""One image in both models, block by block."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import ltmp
from ltmp.app.explorer import first_blocks
from ltmp.errors import LTMPError
from ltmp.hosts.attach import attachment


def test_after_the_last_block_the_model_itself_answers(explorer, pictures):
    opened = explorer.open(pictures[0])
    comparison = explorer.compare(opened, 0.6)
    with torch.inference_mode():
        reduced = explorer.model(opened.pixels)[0].softmax(-1)
        with ltmp.dense():
            plain = explorer.model(opened.pixels)[0].softmax(-1)
    names = ["ant", "bee", "<b>cow</b>", "class 3", "class 4"]
    for answers, wanted in ((opened.dense, plain), (comparison.reduced, reduced)):
        assert len(answers.blocks) == comparison.depth == 3
        best = int(wanted.argmax())
        assert answers.blocks[-1][0] == (names[best], pytest.approx(wanted[best].item()))
        assert answers.seconds > 0


def test_smaller_budgets_leave_less(explorer, pictures):
    opened = explorer.open(pictures[0])
    comparisons = [explorer.compare(opened, share) for share in (1.0, 0.8, 0.6)]
    shares = [comparison.reduction.share for comparison in comparisons]
    assert shares[0] == 1 > shares[1] > shares[2]
    assert comparisons[0].reduced.blocks[-1][0][0] == opened.dense.blocks[-1][0][0]
    assert comparisons[2].picture(2).tobytes() != comparisons[0].picture(2).tobytes()
    assert comparisons[2].strip().width > comparisons[2].picture(0).width


def test_times_are_of_reduced_calls_alone(explorer, pictures, monkeypatch):
    """No trial of `auto`, which runs both ways, and may then answer dense."""
    assert explorer.model.ltmp.config.engine == "auto"
    monkeypatch.setattr("ltmp.engines.trial.run", lambda *_: pytest.fail("both ways were run"))
    opened = explorer.open(pictures[0])
    for share in (0.6, 0.8):
        assert explorer.compare(opened, share).reduced.seconds > 0


def test_left_out_blocks_come_back(explorer, pictures):
    made, image = attachment(explorer.model), explorer.open(pictures[0]).pixels
    found = []
    for how in (ltmp.dense(), nullcontext()):
        with torch.no_grad(), first_blocks(made.body, made.thresholds, 1), ltmp.record() as calls, how:
            found.append(explorer.model(image))
        assert calls.kept[0].shape == (1, 1)
    with torch.no_grad(), ltmp.record() as calls:
        whole = explorer.model(image)
    assert calls.kept[0].shape[1] == made.body.depth > 1
    assert all(not torch.equal(logits, whole) for logits in found)


def test_a_bad_file_is_refused_in_words(explorer, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(LTMPError, match="not an image"):
        explorer.open(tmp_path / "bad.png")
