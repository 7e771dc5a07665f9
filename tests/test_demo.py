"""The demo's job, made small: it writes what it promises, and a second run trains nothing."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ltmp import checkpoint, demo
from ltmp.data import load_digits
from ltmp.errors import MissingExtraError

SMALL = demo.Setup(width=24, depth=3, heads=2, batch=32, small_epochs=0.05, full_epochs=0.02, views=100, val_images=40)
TARGETS = (0.8, 0.6)


class Bars:
    """Stands for the progress bars and remembers them."""

    def __init__(self) -> None:
        self.totals: dict[str, int | None] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def __call__(self, text, total):
        self.totals[text], self.done[text] = total, 0

        def advance(done=1, text_now=None):
            self.done[text] += done

        yield advance


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out, bars = tmp_path_factory.mktemp("demo"), Bars()
    return out, bars, demo.run_demo(out, progress=bars, setup=SMALL, targets=TARGETS)


def test_everything_promised_is_there(finished):
    out, _, evaluations = finished
    assert list(evaluations) == list(TARGETS)
    values = json.loads((out / "table.json").read_text())
    assert [values[f"{t:g}"]["share"] for t in TARGETS] == [evaluations[t].share for t in TARGETS]
    assert len((out / "table.md").read_text().splitlines()) == 2 + 1 + len(TARGETS)
    assert all(Image.open(out / name).size > (100, 100) for name in ("accuracy.png", "patches.png"))


@pytest.mark.parametrize(("speedup", "said"), [(0.9, True), (1.1, False)])
def test_where_the_small_model_is_slower_it_says_so(finished, tmp_path, capsys, speedup, said):
    evaluations = {
        target: replace(done, throughput=replace(done.throughput, speedup=speedup))
        for target, done in finished[2].items()
    }
    demo._write_results(tmp_path, evaluations)
    assert ("Slower than dense at " in capsys.readouterr().out) is said


def test_smaller_budgets_cost_less(finished):
    """How well a budget is met is for the tests of learning: this model is hardly trained."""
    _, _, evaluations = finished
    assert 0.4 < evaluations[0.6].share < evaluations[0.8].share < 1
    assert all(evaluation.tokens == 197 for evaluation in evaluations.values())


def test_thresholds_are_saved_for_each_target(finished):
    out, _, evaluations = finished
    file = checkpoint.read(out / "thresholds-0.6.safetensors")
    assert file.metadata["target"] == 0.6
    assert file.metadata["share"] == evaluations[0.6].share


def test_every_bar_ends_full(finished):
    _, bars, _ = finished
    assert bars.totals == bars.done
    assert {"training at 14x14 pixels", "training at 28x28 pixels", "learning share 0.6"} <= set(bars.done)


def test_second_run_uses_the_trained_model(finished):
    out, _, _ = finished
    bars = Bars()
    demo.trained_model(out / "vit.safetensors", SMALL, 0, bars)
    assert bars.done == {}


def test_distortion_is_slight():
    torch.manual_seed(0)
    images = load_digits("val").tensors[0][:64]
    distorted = demo.distort(images)
    assert distorted.shape == images.shape
    assert not torch.equal(distorted, images)
    kept = torch.cosine_similarity((distorted - demo.BLANK).flatten(1), (images - demo.BLANK).flatten(1))
    assert kept.mean() > 0.6


def test_missing_matplotlib_is_told_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bars = Bars()
    with pytest.raises(MissingExtraError, match="matplotlib"):
        demo.run_demo(tmp_path, progress=bars, setup=SMALL)
    assert bars.done == {}


def test_it_leaves_a_bundle_that_needs_no_more_words(finished):
    import ltmp
    from ltmp.bundle import Bundle
    from ltmp.data import eval_transform, read_image

    out = finished[0]
    bundle = Bundle.open(out / demo.BUNDLE)
    assert (bundle.about.target, list(bundle.about.class_names)) == (0.8, demo.CLASSES)
    model = ltmp.from_pretrained(out / demo.BUNDLE)
    trained = demo.trained_model(out / "vit.safetensors", SMALL, 0, Bars())
    ltmp.load(trained, out / "thresholds-0.8.safetensors")
    picture = read_image(out / demo.DIGITS / "7.png", "L")
    images = eval_transform(model)(picture)[None]
    with torch.inference_mode():
        assert torch.equal(model(images), trained(images))
    assert sorted(file.stem for file in (out / demo.DIGITS).iterdir()) == demo.CLASSES


def test_its_report_shows_what_is_left(finished):
    page = (finished[0] / "report.html").read_text()
    assert page.count('title="tokens left"') == 2 * 12 * len(TARGETS)
