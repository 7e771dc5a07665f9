"""Certifying a dial or a list of models, and everything that must be refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import ltmp
from helpers import make_dial, random_images, tiny_vit
from ltmp.certification.run import _default_budgets
from ltmp.fingerprint import Seen
from ltmp.hosts.attach import thresholds_of
from ltmp.method.certificate import Certificate

N = 64


@pytest.fixture(scope="module")
def images():
    return random_images(N)


@pytest.fixture
def model():
    found = ltmp.attach(tiny_vit())
    thresholds_of(found).set_dial(make_dial(3))
    thresholds_of(found).set_budget(0.6)
    return found


def batches(images, labels=None, size=50):
    labels = torch.full((len(images),), -1) if labels is None else labels
    return list(zip(images.split(size), labels.split(size), strict=True))


def answers(model, images, budget=None):
    with torch.inference_mode():
        if budget is None:
            with ltmp.dense():
                return model(images)
        thresholds_of(model).set_budget(budget)
        return model(images)


class Says(nn.Module):
    """Answers class 1 on the images whose number, their first pixel, is from `first` to `wrong`, else 0."""

    def __init__(self, wrong, first=0):
        super().__init__()
        self.first, self.wrong, self.calls = first, wrong, 0

    def forward(self, images):
        self.calls += len(images)
        number = images[:, 0, 0, 0]
        return nn.functional.one_hot(((number >= self.first) & (number < self.wrong)).long(), 2).float()


def numbered(count=1000):
    images = torch.zeros(count, 3, 4, 4)
    images[:, 0, 0, 0] = torch.arange(count)
    return images[torch.randperm(count, generator=torch.Generator().manual_seed(0))]


def test_measures_each_budget_as_it_is_run(model, images):
    found = ltmp.certify(model, batches(images), at_most=0.5, budgets=[0.9, 0.5, 0.7])
    plain = answers(model, images).argmax(-1)
    for test in found.tested:
        differ = answers(model, images, test.budget).argmax(-1) != plain
        assert test.risk == pytest.approx(differ.float().mean().item())
    assert [test.budget for test in found.tested] == [0.9, 0.7, 0.5]
    assert found.images == N
    assert found.learned is None


@pytest.mark.parametrize(
    ("lowest", "highest", "shares"),
    [(0.3, 0.95, [0.95, 0.9]), (0.41, 0.89, [0.85, 0.8]), (0.61, 0.64, [0.64, 0.61])],
)
def test_every_twentieth_of_a_dial_is_tested(lowest, highest, shares):
    assert _default_budgets(make_dial(3, lowest=lowest, highest=highest))[:2] == pytest.approx(shares)


def test_leaves_the_model_as_it_was_and_runs_dense_once(model, images):
    own = thresholds_of(model).train()
    ltmp.certify(model, batches(images), at_most=0.5, budgets=[0.9])
    assert own.budget == 0.6
    assert own.training
    assert not model.training


def test_certifies_the_last_budget_that_passes():
    """3 of 1,000 others are within 1 % at 95 % confidence, 5 are not (Clopper-Pearson: 0.77 and 1.05 %)."""
    wrong = [(1, Says(0)), (0.9, Says(0)), (0.8, Says(3)), (0.7, Says(5)), (0.6, Says(300))]
    found = ltmp.certify(wrong, batches(numbered()))
    assert found.budget == 0.8
    assert found.found.risk == 0.003
    assert found.found.upper == pytest.approx(0.00774, abs=1e-4)
    assert found.failed.budget == 0.7
    assert 0 < found.more < 1000
    assert "budget 0.8: with 95 % confidence at most 1 % of answers differ" in found.sentence()


def test_a_hopeless_budget_is_given_up_early():
    bad = Says(800)
    found = ltmp.certify([(1, Says(0)), (0.9, Says(0)), (0.5, bad)], batches(numbered()))
    assert bad.calls == 50
    assert found.tested[1].images == 50
    assert found.tested[1].p == 1
    assert found.budget == 0.9
    assert found.more is None


def test_a_risk_that_does_not_rise_stops_at_the_first_failure_and_says_so():
    found = ltmp.certify([(1, Says(0)), (0.9, Says(0)), (0.8, Says(9)), (0.7, Says(0))], batches(numbered()))
    assert found.budget == 0.9
    assert found.out_of_order == (0.7,)
    assert "testing stopped at 0.8, although 0.7 alone would have passed" in found.sentence()


def test_nothing_certified_says_how_many_more_images():
    found = ltmp.certify([(1, Says(0)), (0.9, Says(2))], batches(numbered(400)))
    assert found.budget is None
    assert found.more > 100
    assert "no budget is certified" in found.sentence()
    assert "more images like these would certify 0.9" in found.sentence()


def test_error_is_paired():
    """A model that is wrong as often as the dense one, but on other images, loses no accuracy."""
    loader = batches(numbered(), torch.zeros(1000, dtype=torch.long))
    models = [(1, Says(20)), (0.9, Says(0)), (0.8, Says(40, 20)), (0.7, Says(80))]
    found = ltmp.certify(models, loader, "error", 0.03)
    assert [test.risk for test in found.tested] == pytest.approx([-0.02, 0.0, 0.06])
    assert found.budget == 0.8
    assert "accuracy is at most 3 points below the dense model's" in found.sentence()


def test_embedding_counts_those_that_moved_far(images):
    model = ltmp.attach(tiny_vit(num_classes=0))
    thresholds_of(model).set_dial(make_dial(3))
    found = ltmp.certify(model, batches(images), "embedding", 0.5, limit=0.2, budgets=[0.9])
    plain, reduced = answers(model, images), answers(model, images, 0.9)
    far = 1 - nn.functional.cosine_similarity(plain, reduced) > 0.2
    assert found.tested[0].risk == pytest.approx(far.float().mean().item())
    assert found.limit == 0.2


def test_a_function_may_be_the_risk(model, images):
    def half_of_the_distance(reduced, dense, labels):
        return (reduced.softmax(-1) - dense.softmax(-1)).abs().sum(-1) / 2

    found = ltmp.certify(model, batches(images), half_of_the_distance, 0.6, budgets=[0.95])
    assert found.risk == "half_of_the_distance"
    assert 0 < found.tested[0].risk < found.tested[0].upper
    assert "the mean of half_of_the_distance is at most 0.6" in found.sentence()


def test_the_order_of_the_images_does_not_matter_where_they_are_sorted():
    """Sorted by class, all bad images may come last: betting shuffles them first."""

    def loss(reduced, dense, labels):
        return labels.double() / 2

    labels = torch.cat([torch.zeros(900), torch.ones(100)]).long()
    pairs = [(1, Says(0)), (0.9, Says(0))]
    found = ltmp.certify(pairs, batches(numbered(), labels), loss, 0.049)
    assert found.tested[0].risk == 0.05
    assert found.budget is None


def test_images_that_were_learned_on_are_refused(model, images):
    thresholds_of(model).seen = Seen()
    thresholds_of(model).seen.add(images[:7])
    with pytest.raises(
        ltmp.LTMPError, match="7 of these 64 images are among those that the thresholds were learned on"
    ):
        ltmp.certify(model, batches(images), at_most=0.5, budgets=[0.9])
    assert ltmp.certify(model, batches(images[7:]), at_most=0.5, budgets=[0.9]).learned == 7


@pytest.mark.parametrize(("learn", "looked_at"), [
    (lambda model, loader: ltmp.learn(model, loader, 0.6, views=16, calibration=8), 16),
    (lambda model, loader: ltmp.learn_dial(model, loader, 0.4, 0.9, knots=2, views=0, calibration=8, checked=24), 24),
])  # fmt: skip
def test_learning_remembers_its_images(learn, looked_at, images, tmp_path):
    model = ltmp.attach(tiny_vit())
    loader = [(part, torch.zeros(len(part), dtype=torch.long)) for part in images[:32].split(8)]
    learn(model, loader)
    assert thresholds_of(model).seen.images == looked_at
    ltmp.save(model, tmp_path / "t.safetensors")
    other = tiny_vit()
    ltmp.load(other, tmp_path / "t.safetensors")
    assert torch.equal(thresholds_of(other).seen.keys, thresholds_of(model).seen.keys)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"risk": "surprise"}, "unknown risk 'surprise': expected one of disagree, error, embedding"),
        ({"at_most": 1.0}, "expected a level in"),
        ({"confidence": 0.3}, "expected a level in"),
        ({"at_most": 0.005}, "64 images are too few: at most 0.005 with confidence 0.95 takes at least 598"),
        ({"budgets": [0.1]}, "this dial goes from 0.3 to 0.95"),
        ({"budgets": [0.5, 0.5]}, "expected different shares between 0 and 1"),
        ({"risk": "error"}, "needs labels, which these images lack"),
        ({"risk": "embedding", "limit": 3.0}, "expected a distance 1 - cosine"),
        ({"risk": lambda reduced, dense, labels: reduced[:, 0] * 0 + 2}, "gave 2: it must be between 0 and 1"),
        ({"risk": lambda reduced, dense, labels: reduced[:, 0] * 0 - 0.5}, "gave -0.5: it must be between 0 and 1"),
        ({"risk": lambda reduced, dense, labels: reduced[:, 0] * float("nan")}, "gave nan: it must be between 0 and 1"),
        ({"risk": lambda reduced, dense, labels: reduced}, "must give a tensor of one number"),
    ],
)
def test_bad_input_is_one_sentence(model, images, change, sentence):
    with pytest.raises(ltmp.LTMPError, match=sentence) as caught:
        ltmp.certify(model, batches(images), **{"at_most": 0.5, **change})
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_single_label_that_is_missing_is_told(model, images):
    labels = torch.zeros(N, dtype=torch.long)
    labels[-1] = -1
    with pytest.raises(ltmp.LTMPError, match="needs labels, which these images lack"):
        ltmp.certify(model, batches(images, labels), "error", 0.5, budgets=[0.9])


@pytest.mark.parametrize(
    "prepare", [lambda model: model, ltmp.attach, lambda m: ltmp.attach(m, ltmp.LTMPConfig("m", r=2))]
)
def test_without_a_dial_there_is_nothing_to_certify(prepare, images):
    with pytest.raises(ltmp.LTMPError, match="there is no dial to certify a budget of"):
        ltmp.certify(prepare(tiny_vit()), batches(images), at_most=0.5)


@pytest.mark.parametrize(
    "pairs", [[], [(0.5, Says(0))], [(1, Says(0))], [(1, Says(0)), (0.5, Says(0)), (0.5, Says(1))]]
)
def test_a_list_needs_the_dense_model_and_another(pairs, images):
    with pytest.raises(ltmp.LTMPError, match="one of share 1 that the others are compared with"):
        ltmp.certify(pairs, batches(images), at_most=0.5)


@pytest.fixture
def certified(model, images, tmp_path):
    found = ltmp.certify(model, batches(images), lambda reduced, dense, labels: labels > 0, 0.05, budgets=[0.8, 0.5])
    assert found.budget == 0.5
    ltmp.save(model, tmp_path / "dial.safetensors")
    return tmp_path / "dial.safetensors"


def test_a_certificate_survives_json_and_files(model, certified):
    found = thresholds_of(model).certificate
    assert Certificate.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    other = tiny_vit()
    ltmp.load(other, certified)
    assert thresholds_of(other).certificate == found
    assert thresholds_of(other).budget == 0.6


def test_load_sets_the_certified_budget(certified):
    model = tiny_vit()
    ltmp.load(model, certified, certified=True)
    assert thresholds_of(model).budget == 0.5


def refuse(model, path, sentence, **how):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ltmp.LTMPError, match=sentence) as caught:
        ltmp.load(model, path, certified=True, **how)
    assert "\n" not in str(caught.value)
    assert model.state_dict().keys() == before.keys()
    return caught.value


def test_changed_thresholds_void_it(certified, tmp_path):
    model = tiny_vit()
    ltmp.load(model, certified)
    thresholds_of(model).set_dial(make_dial(3, seed=1))
    ltmp.save(model, tmp_path / "changed.safetensors")
    refuse(tiny_vit(), tmp_path / "changed.safetensors", "void, as its thresholds were changed since")


def test_another_precision_voids_it(certified):
    refuse(
        tiny_vit(), certified, "is for float32, but the model runs in float32, autocast bfloat16", amp=torch.bfloat16
    )
    refuse(tiny_vit().half(), certified, "is for float32, but the model runs in float16")


def test_other_weights_void_it(certified):
    refuse(tiny_vit(seed=1), certified, "is for other weights than this model's")


def test_asking_without_a_certificate_or_with_a_budget(model, certified, tmp_path):
    thresholds_of(model).certificate = None
    ltmp.save(model, tmp_path / "plain.safetensors")
    assert refuse(tiny_vit(), tmp_path / "plain.safetensors", "has no certificate: make one").exit_code == 2
    assert refuse(tiny_vit(), certified, "ask for one of them", budget=0.5).exit_code == 2


def test_a_certificate_of_nothing_is_no_guarantee(model, images, tmp_path):
    ltmp.certify(model, batches(images), lambda reduced, dense, labels: labels < 0, 0.05, budgets=[0.8])
    ltmp.save(model, tmp_path / "none.safetensors")
    refuse(tiny_vit(), tmp_path / "none.safetensors", "certifies nothing: no budget is certified")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"budget": 0.3}, "not the last one that its own tests passed"),
        ({"at_most": 2}, "expected parts of 1"),
        ({"images": -1}, "must be whole and not negative"),
        ({"surprise": 1}, "unexpected or missing surprise"),
        ({"tested": [{"budget": 0.5}]}, "missing"),
        ({"tested": [], "budget": None}, "no budget was tested"),
        ({"precision": None}, "precision is None"),
    ],
)
def test_a_broken_certificate_is_refused(model, certified, change, reason):
    values = thresholds_of(model).certificate.to_dict()
    with pytest.raises(ltmp.LTMPError, match=reason):
        Certificate.from_dict({**values, **change})


def test_a_certificate_holds_through_devices_copies_and_engines(model, images):
    """What does not change an answer does not void it."""
    ltmp.certify(model, batches(images), lambda reduced, dense, labels: labels > 0, 0.05, budgets=[0.5])
    other = copy.deepcopy(model)
    thresholds_of(other).set_budget(0.7)
    assert thresholds_of(other).certificate == thresholds_of(model).certificate
