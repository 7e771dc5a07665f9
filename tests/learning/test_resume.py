"""A run resumes only with its own settings, weights and data, from its last completed step, whenever it was stopped."""

from __future__ import annotations

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ltmp
from helpers import random_images, tiny_vit
from ltmp.data import eval_transform, make_loader, open_dataset
from ltmp.errors import LTMPError
from ltmp.learning import dial as dialling
from ltmp.learning import loop, optimiser, start, weights
from ltmp.learning.resume import frozen, load_run, save_run

TARGET = 0.65
SHORT: dict[str, Any] = {"views": 96, "calibration": 48}


def model_and_batches(**kwargs: Any) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    model = tiny_vit(depth=4, **kwargs)
    images = random_images(96)
    labels = torch.arange(96) % 5
    return ltmp.attach(model), list(zip(images.split(16), labels.split(16), strict=True))


# -- stopped in the middle of a step

MOMENTS = {
    "after the weights' optimiser": (torch.optim.AdamW, "step"),
    "after the thresholds' optimiser": (torch.optim.Adam, "step"),
    "after the weights": (weights.Weights, "update"),
    "before the step is counted": (torch.optim.lr_scheduler.OneCycleLR, "step"),
    "after the step is counted": (optimiser.ThresholdOptimiser, "write"),
    "after the step": (optimiser.ThresholdOptimiser, "update"),
    "while it is remembered": (weights.Weights, "state"),
}

OF_WEIGHTS = (torch.optim.AdamW, weights.Weights)
# the calibrated thresholds of `tune` wait while the weights learn
OF_THRESHOLDS = (torch.optim.Adam,)


@pytest.mark.parametrize(
    ("moment", "tuned"),
    [(name, True) for name in MOMENTS if MOMENTS[name][0] not in OF_THRESHOLDS]
    + [(name, False) for name in MOMENTS if MOMENTS[name][0] not in OF_WEIGHTS],
)
def test_an_interrupt_in_the_middle_of_a_step_is_not_seen(
    moment: str, tuned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = MOMENTS[moment]
    run = ltmp.tune if tuned else ltmp.learn
    how = {"calibration": 48, **({"epochs": 2.0} if tuned else {"views": 96})}
    whole, batches = model_and_batches()
    run(whole, batches, TARGET, **how)

    broken, batches = model_and_batches()
    real, calls = getattr(owner, name), []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = real(self, *args, **kwargs)
        # AdamW takes its step from Adam
        if not isinstance(self, torch.optim.Optimizer) or type(self) is owner:
            calls.append(name)
            # some of them are called before the first step, too, but none twice
            if len(calls) == 3:
                raise KeyboardInterrupt
        return found

    # torch wraps the step of a class that does not carry this mark, and a wrapper of ours would outlive the test
    interrupted.hooked = True  # type: ignore[attr-defined]
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(broken, batches, TARGET, checkpoint=tmp_path / "run.pt", **how)
    monkeypatch.undo()
    broken, batches = model_and_batches()
    result = run(broken, batches, TARGET, checkpoint=tmp_path / "run.pt", **how)
    assert [step.step for step in result.history] == list(range(1, len(result.history) + 1))
    assert all(torch.equal(value, broken.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_state_that_is_kept_is_a_copy() -> None:
    value = {"a": torch.ones(2), "b": [torch.zeros(1), 3], "c": (1, "x")}
    kept = frozen(value)
    value["a"].add_(1)
    assert kept["a"].tolist() == [1, 1]
    assert kept["c"] == [1, "x"]


# -- damaged


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, batches = model_and_batches()
    ltmp.learn(model, batches, TARGET, checkpoint=tmp_path / "run.pt", **SHORT)
    return tmp_path / "run.pt"


def without(*path: str) -> Any:
    def change(content: dict[str, Any]) -> Any:
        inner = content
        for name in path[:-1]:
            inner = inner[name]
        del inner[path[-1]]
        return content

    return change


def replaced(*path: Any) -> Any:
    def change(content: dict[str, Any]) -> Any:
        inner = content
        for name in path[:-2]:
            inner = inner[name]
        inner[path[-2]] = path[-1]
        return content

    return change


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("unpickled",)


DAMAGES = {
    **{
        f"without {name}": without("state", name)
        for name in ("start", "step", "latent", "mean", "optimizer", "history")
    },
    "without a vector": without("state", "latent", "merge"),
    "without settings": without("settings"),
    "without a state": without("state"),
    "settings are a list": replaced("settings", [1]),
    "state is a number": replaced("state", 3),
    "another format": replaced("format", "other"),
    "a step that is none": replaced("state", "step", -5),
    "more steps than there are": replaced("state", "step", 10**12),
    "step is a text": replaced("state", "step", "3"),
    "history cut off": replaced("state", "history", []),
    "history of numbers": replaced("state", "history", [1] * 6),
    "vector of another length": replaced("state", "latent", "merge", torch.ones(1)),
    "vector with NaN": replaced("state", "mean", "prune", torch.full((4,), float("nan"))),
    "vector is a list": replaced("state", "latent", "prune", [0.1] * 4),
    "optimiser of something else": replaced("state", "optimizer", {"state": {}, "param_groups": []}),
    "start without a share": without("state", "start", "share"),
    "settled is a list": replaced("state", "settled", [1]),
    "settled without views": without("state", "settled", "views"),
    "settled by scores that nobody chose": replaced("state", "settled", "size_power", 7.0),
    "a probe that no scores ask for": replaced("state", "settled", "probe", torch.ones(4, 3, 66)),
    "a list": lambda content: [content],
    "empty": lambda content: {},
    "code": lambda content: {**content, "state": Code()},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_is_refused(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    content = torch.load(saved, weights_only=True)
    torch.save(DAMAGES[name](content), saved)
    model, batches = model_and_batches()
    with pytest.raises(LTMPError, match=r"run\.pt is .*(delete it to start over|choose another)") as refusal:
        ltmp.learn(model, batches, TARGET, checkpoint=saved, **SHORT)
    assert "\n" not in str(refusal.value)
    assert not Path("unpickled").exists()


def test_bytes_that_changed_are_noticed(saved: Path) -> None:
    good = saved.read_bytes()
    expected = torch.load(saved, weights_only=True)["state"]
    for at in range(7, len(good), len(good) // 60):
        saved.write_bytes(good[:at] + bytes([good[at] ^ 0x55]) + good[at + 1 :])
        found = None
        with suppress(LTMPError):
            found = load_run(saved, {})
        # or else a byte that nothing reads, between the parts of the file
        assert found is None or pickle.dumps(_plain(found)) == pickle.dumps(_plain(expected))
    for end in range(0, len(good), len(good) // 20):
        saved.write_bytes(good[:end])
        with pytest.raises(LTMPError, match="truncated or not a learning run"):
            load_run(saved, {})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


# -- of something else


def photographs(folder: Path, seed: int = 0, names: str = "abc", count: int = 4) -> Path:
    noise = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True)
        for k in range(count):
            Image.fromarray(noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    return folder


def loader_of(folder: Path, model: Any, **options: Any) -> Any:
    dataset = open_dataset(folder, transform=eval_transform(model, **options), labelled=False)
    return make_loader(dataset, 4, shuffle=True, seed=1)


def learn(model: Any, loader: Any, **how: Any) -> None:
    ltmp.learn(model, loader, 0.8, views=8, calibration=8, distill=True, **how)


def dial(model: Any, loader: Any, **how: Any) -> None:
    ltmp.learn_dial(model, loader, 0.6, 0.9, knots=2, views=200, calibration=8, checked=0, **how)


def tune(model: Any, loader: Any, **how: Any) -> None:
    ltmp.tune(model, loader, 0.8, epochs=1, calibration=8, distill=True, **how)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("images")
    return {
        "same": photographs(base / "same"),
        "more": photographs(base / "more", count=5),
        "others of the same names": photographs(base / "others", seed=1),
        "other names": photographs(base / "names", names="abd"),
        "moved": photographs(base / "moved"),
    }


OTHERS = {
    "more": "another data set",
    "other names": "another data set",
    "others of the same names": "other images",
    "crop": "another transform of its images",
    "mean": "another transform of its images",
    "weights": "other weights",
    "amp": r"other settings \(amp None, now 'torch.bfloat16'\)",
    "seed": r"other settings \(seed 0, now 7\)",
}


@pytest.mark.parametrize("verb", [learn, dial, tune])
def test_a_run_of_something_else_is_refused_by_name(verb: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run.pt"
    model = ltmp.attach(tiny_vit(num_classes=3))
    verb(model, loader_of(folders["same"], model), checkpoint=run)
    if not run.exists():
        pytest.fail("nothing was saved")
    before = run.read_bytes()
    for other, message in OTHERS.items():
        model = ltmp.attach(tiny_vit(num_classes=3, seed=int(other == "weights")))
        how = {"crop": {"crop_pct": 0.5}, "mean": {"mean": (0.1, 0.1, 0.1)}}.get(other, {})
        more = {"amp": {"amp": torch.bfloat16}, "seed": {"seed": 7}}.get(other, {})
        loader = loader_of(folders.get(other, folders["same"]), model, **how)
        with pytest.raises(LTMPError, match=rf"run\.pt is of a run with .*{message}.*: repeat those, or delete it"):
            verb(model, loader, checkpoint=run, **more)
    assert run.read_bytes() == before
    # the same images elsewhere are the same
    model = ltmp.attach(tiny_vit(num_classes=3))
    verb(model, loader_of(folders["moved"], model), checkpoint=run)


def test_a_run_of_an_older_version_goes_on(tmp_path: Path) -> None:
    save_run(tmp_path / "run.pt", {"seed": 0}, {"step": 3})
    now = {"seed": 0, "amp": None, "weights": "a", "images": [1, 2], "listing": "b", "transform": "c"}
    assert load_run(tmp_path / "run.pt", now) == {"step": 3}


def test_images_that_are_drawn_at_random_are_not_compared(tmp_path: Path) -> None:
    class Noisy(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.randn(3, 16, 16), index % 5

    for _ in range(2):
        model = ltmp.attach(tiny_vit())
        learn(model, make_loader(Noisy(), 4), checkpoint=tmp_path / "run.pt")


@pytest.mark.parametrize("verb", ["learn", "dial"])
def test_what_images_settled_is_not_settled_again(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe, and what merged tokens count as: the resumed run has them from its file, and ends as the whole one."""

    def run(stop: int | None = None, **more: Any) -> Any:
        # scores of a name leave what merged tokens count as open
        model, batches = model_and_batches()
        ltmp.attach(model, ltmp.LTMPConfig(scores="best"))
        if verb == "learn":
            asked: dict[str, Any] = {"on_step": raising} if stop else {}
            ltmp.learn(model, batches, TARGET, save_every=1, **SHORT, **asked, **more)
        else:
            settings = {"knots": 3, "views": 3 * 8 * 48, "calibration": 48, "checked": 0}
            ltmp.learn_dial(model, batches, 0.6, 0.9, **settings, **more)
        return model

    def raising(step: Any) -> None:
        if step.step == 3:
            raise KeyboardInterrupt

    whole = run()
    asked: list[str] = []
    search = dialling._Maker.search

    def searched(self: Any, *args: Any) -> Any:
        asked.append("search")
        if len(asked) == 2:
            raise KeyboardInterrupt
        return search(self, *args)

    monkeypatch.setattr(dialling._Maker, "search", searched)
    with pytest.raises(KeyboardInterrupt):
        run(stop=3, checkpoint=tmp_path / "run.pt")
    for module in (dialling, loop):
        monkeypatch.setattr(module, "learn_probe", lambda *_, **__: pytest.fail("a probe is learned again"))
    monkeypatch.setattr(start.Calibrator, "choose_starts", lambda *_: pytest.fail("images settle again"))
    again = run(checkpoint=tmp_path / "run.pt")
    assert again.ltmp.config == whole.ltmp.config
    found = again.ltmp.state_dict()
    assert all(torch.equal(found[name], value) for name, value in whole.ltmp.state_dict().items())
