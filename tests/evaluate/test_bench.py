"""The benchmark checks each way before timing it; a way that fails has no speed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import attach_reducing, make_probe, random_images, tiny_vit
from ltmp.config import SCORES, Scores
from ltmp.errors import LTMPError
from ltmp.evaluate import bench
from ltmp.evaluate.agreement import decisions_agree
from ltmp.evaluate.bench import Bench, Row, table
from ltmp.hosts.attach import attachment


def reduced_model(**kwargs: Any) -> Any:
    return attach_reducing(tiny_vit(**kwargs), random_images(6))


def test_every_way_is_timed_and_compared() -> None:
    rows = {row.way: row for row in Bench(reduced_model(), random_images(3), compiled=False).run(seconds=0.01)}
    assert {"dense", "packed", "fixed-rate merge"} <= set(rows)
    assert all(row.images_per_second and row.images_per_second > 0 for row in rows.values())
    assert rows["dense"].share == 1
    assert max(row.ratio or 0 for way, row in rows.items() if way.startswith("dense")) == 1
    assert rows["packed"].share < 1
    assert rows["packed"].ideal == pytest.approx(1 / rows["packed"].share)
    if "triton" in rows:
        assert rows["triton"].decisions == 1
        assert rows["triton"].logits < 1e-4


def test_fixed_rate_that_cannot_reach_the_share_is_noted() -> None:
    model = attach_reducing(tiny_vit(depth=2), random_images(6), at=0.05)
    *_, last = Bench(model, random_images(3), compiled=False).run(seconds=0.01)
    assert last.way == "fixed-rate merge"
    assert "cannot go below a share of" in last.note
    assert last.to_dict()["share"] is None
    assert last.note in table([last])


def test_model_is_left_as_it_was() -> None:
    model = reduced_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.ltmp.config
    Bench(model, random_images(2), compiled=False).run(seconds=0.01)
    assert model.ltmp.config == config
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_wrong_logits_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from ltmp.engines import triton

    right = triton.run

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return replace(found, x=found.x.flip(-1))

    monkeypatch.setattr(triton, "run", wrong)
    rows = {row.way: row for row in Bench(reduced_model(), random_images(2), compiled=False).run(seconds=0.01)}
    if "triton" not in rows:
        pytest.skip("the Triton engine does not run here")
    assert rows["triton"].images_per_second is None
    assert "from float32's" in rows["triton"].note
    assert rows["packed"].images_per_second is not None


def test_wrong_decisions_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "decisions_agree", lambda *_: 0.99)
    rows = {row.way: row for row in Bench(reduced_model(), random_images(2), compiled=False).run(seconds=0.01)}
    if "triton" not in rows:
        pytest.skip("the Triton engine does not run here")
    assert rows["triton"].images_per_second is None
    assert rows["triton"].note == "only 99.00 % of decisions equal the reference's"


@pytest.mark.parametrize(
    "scores",
    [*SCORES.values(), Scores(size_power=0.5)],
    ids=str,
)
@pytest.mark.parametrize("variant", ["ltmp", "ltm", "ltp"])
def test_decisions_are_compared_one_by_one(variant: str, scores: Scores) -> None:
    pytest.importorskip("triton")
    images = random_images(3)
    model = attach_reducing(tiny_vit(reg_tokens=2), images, variant)
    model.ltmp.config = replace(model.ltmp.config, scores=scores)
    model.ltmp.set_probe(make_probe(model.ltmp.depth))
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    assert decisions_agree(attachment(model).body, x) == 1


def test_train_mode_is_refused() -> None:
    with pytest.raises(LTMPError, match=r"call model\.eval\(\) first"):
        Bench(reduced_model().train(), random_images(2)).check()


def test_table_has_no_speed_for_failed_rows() -> None:
    rows = [Row("dense", 100.0, 1, 1, 1.0, None, 0.0), Row("graph", None, 0.5, 2, None, 0.98, 0.3, "red")]
    lines = table(rows).splitlines()
    assert lines[1].split() == ["dense", "100", "1.000", "1.00", "1.00", "0.0000"]
    assert lines[2].split() == ["graph", "0.500", "2.00", "98.000%", "0.3000", "red"]
