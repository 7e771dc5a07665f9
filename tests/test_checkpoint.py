"""Thresholds on disk: small, bound to their model, and refused in one sentence when they cannot be right."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ltmp
from helpers import make_dial, make_probe, random_images, run_recorded, tiny_vit
from ltmp import LTMPConfig, LTMPError
from ltmp.checkpoint import FORMAT, annotate, apply, read
from ltmp.checkpoint.contents import split_seed_state, split_thresholds
from ltmp.config import SCORES, Scores
from ltmp.errors import UsageError
from ltmp.files.tensors import read_state_dict
from ltmp.hosts.attach import is_attached
from ltmp.method.dial import Dial
from ltmp.zoo.build import load_weights

MERGE, PRUNE = [0.5, 0.6, 0.7], [0.01, 0.02, 0.03]


def attached(**kwargs: Any) -> Any:
    model = ltmp.attach(tiny_vit(**kwargs))
    depth = model.ltmp.depth
    model.ltmp.set((MERGE * 4)[:depth], (PRUNE * 4)[:depth])
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "thresholds.safetensors"
    ltmp.save(attached(), path, target=0.6, share=0.59)
    return path


def test_round_trip(saved: Path) -> None:
    model = tiny_vit()
    file = ltmp.load(model, saved)
    assert torch.equal(model.ltmp.merge, torch.tensor(MERGE))
    assert torch.equal(model.ltmp.prune, torch.tensor(PRUNE))
    assert not model.ltmp.training
    assert file.metadata["target"] == 0.6
    assert file.metadata["share"] == 0.59
    assert file.metadata["depth"] == 3
    assert file.metadata["width"] == 16
    assert file.metadata["input_size"] == [16, 16]
    assert file.metadata["version"] == ltmp.__version__


@torch.no_grad()
def test_loaded_model_is_the_saved_one(saved: Path) -> None:
    images = random_images(3)
    expected, kept = run_recorded(attached(), images)
    model = tiny_vit()
    ltmp.load(model, saved)
    logits, again = run_recorded(model, images)
    assert torch.equal(logits, expected)
    assert torch.equal(kept, again)
    assert kept[:, -1].lt(17).all()


def test_small(saved: Path) -> None:
    assert saved.stat().st_size < 10_000


def test_settings_travel(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    ltmp.save(ltmp.attach(tiny_vit(), LTMPConfig(variant="ltpm", tau=0.3, engine="packed")), path)
    model = tiny_vit()
    ltmp.load(model, path)
    assert model.ltmp.config == LTMPConfig(variant="ltpm", tau=0.3, engine="packed")
    other = tiny_vit()
    ltmp.load(other, path, engine="auto")
    assert other.ltmp.config.engine == "auto"


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_the_engine_asked_for_is_set_on_an_attached_model_too(saved: Path, way: str) -> None:
    model = ltmp.attach(tiny_vit(), LTMPConfig(engine="packed"))
    ltmp.load(model, saved)
    assert model.ltmp.config.engine == "packed"
    if way == "load":
        ltmp.load(model, saved, engine="graph")
    else:
        ltmp.from_pretrained(saved, model, engine="graph")
    assert model.ltmp.config.engine == "graph"
    with pytest.raises(UsageError, match="unknown engine 'warp': expected one of auto"):
        ltmp.load(model, saved, engine="warp")
    assert model.ltmp.config.engine == "graph"
    bare = tiny_vit()
    with pytest.raises(UsageError, match="unknown engine 'warp'"):
        ltmp.load(bare, saved, engine="warp")
    assert not is_attached(bare)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, which it does not where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@torch.no_grad()
@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("before", [False, True], ids=["bare", "attached"])
def test_a_model_whose_loading_was_interrupted_can_be_loaded(saved: Path, before: bool) -> None:
    """Ctrl-C at every fiftieth line."""
    images = random_images(2)
    expected = attached()(images)
    for moment in range(0, 3000, 50):
        model, lines = tiny_vit(), count()
        if before:
            ltmp.attach(model)

        def stop(frame: Any, event: str, _: Any, lines: Any = lines, moment: int = moment) -> Any:
            if "ltmp" in frame.f_code.co_filename and event == "line" and next(lines) == moment:
                signal.raise_signal(signal.SIGINT)
            return stop

        sys.settrace(stop)
        try:
            with suppress(KeyboardInterrupt):
                ltmp.load(model, saved)
        finally:
            sys.settrace(None)
        ltmp.load(model, saved)
        assert torch.equal(model(images), expected)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert next(lines) < 3000


LIMITS = [
    # what the model was attached with, what the file has, what counts
    ({}, {"floor": 4, "ceiling": 9}, (4, 9)),
    ({"floor": 2}, {}, (2, None)),
    ({"floor": 2}, {"ceiling": 9}, (2, 9)),
    ({"floor": 2, "ceiling": 9}, {"floor": 2, "ceiling": 9}, (2, 9)),
    ({"floor": 2}, {"floor": 3}, r"floor 3, but the model was attached with floor 2: attach with LTMPConfig\(floor=3"),
    ({"ceiling": 9}, {"ceiling": 8}, "ceiling 8, but the model was attached with ceiling 9"),
    ({"floor": 12}, {"ceiling": 9}, "floor 12, ceiling 9"),
]


@pytest.mark.parametrize(("own", "files", "expected"), LIMITS)
@pytest.mark.parametrize("fixed", [False, True], ids=["learned", "fixed"])
def test_floor_and_ceiling_are_the_files_unless_the_model_has_its_own(
    tmp_path: Path, own: dict[str, int], files: dict[str, int], expected: Any, fixed: bool
) -> None:
    kind: dict[str, Any] = {"variant": "m", "r": 2} if fixed else {}
    path = tmp_path / "t.safetensors"
    ltmp.save(ltmp.attach(tiny_vit(), LTMPConfig(**kind, **files)), path)
    model = ltmp.attach(tiny_vit(), LTMPConfig(**kind, **own))
    if isinstance(expected, str):
        with pytest.raises(LTMPError, match=expected):
            ltmp.load(model, path)
        expected = (own.get("floor", 0), own.get("ceiling"))
    else:
        ltmp.load(model, path)
    assert (model.ltmp.config.floor, model.ltmp.config.ceiling) == expected


@torch.no_grad()
def test_a_floor_from_the_file_is_kept_to(tmp_path: Path) -> None:
    path, model = tmp_path / "t.safetensors", ltmp.attach(tiny_vit(), LTMPConfig(floor=15))
    model.ltmp.set([-1.0] * 3, [0.9] * 3)
    ltmp.save(model, path)
    other = ltmp.attach(tiny_vit())
    ltmp.load(other, path)
    assert run_recorded(other, random_images(2))[1].min() == 15


@pytest.mark.parametrize("name", ["t.pt", "t.pth", "t", "t.safetensors.bak"])
def test_saving_under_a_name_that_would_not_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"saved as safetensors, give a name that ends in \.safetensors"):
        ltmp.save(attached(), tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_saving_needs_an_attachment(tmp_path: Path) -> None:
    with pytest.raises(LTMPError, match="nothing is attached"):
        ltmp.save(tiny_vit(), tmp_path / "t.safetensors")
    assert os.listdir(tmp_path) == []


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "depth": (partial(tiny_vit, depth=4), "number of blocks 3, but this model's is 4"),
    "width": (partial(tiny_vit, embed_dim=32), "width 16, but this model's is 32"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("before", [False, True], ids=["bare", "attached"])
def test_another_model_is_refused_and_unchanged(saved: Path, name: str, before: bool) -> None:
    build, fragment = REFUSED[name]
    model = build()
    if before:
        ltmp.attach(model)
    with pytest.raises(LTMPError, match=fragment):
        ltmp.load(model, saved)
    assert is_attached(model) is before
    if before:
        assert model.ltmp.merge.tolist() == [1.0] * model.ltmp.depth


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "t.safetensors", attached()
    model.pretrained_cfg = {"architecture": "deit_tiny"}
    ltmp.save(model, path)
    other = tiny_vit()
    other.pretrained_cfg = {"architecture": "vit_tiny"}
    with pytest.raises(LTMPError, match="architecture deit_tiny, but this model's is vit_tiny"):
        ltmp.load(other, path)


def test_another_variant_is_refused(saved: Path) -> None:
    model = ltmp.attach(tiny_vit(), LTMPConfig(variant="ltm"))
    with pytest.raises(LTMPError, match=r"variant ltmp, but the model was attached as ltm"):
        ltmp.load(model, saved)


def write_tensors(path: Path, **tensors: torch.Tensor) -> None:
    about = json.dumps({"config": LTMPConfig().to_dict()})
    save_file(tensors, path, metadata={"format": FORMAT, "ltmp": about})


def test_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, merge=torch.tensor([0.5, float("nan"), 0.5]), prune=torch.zeros(3))
    model = tiny_vit()
    with pytest.raises(
        LTMPError, match=r"t\.safetensors is damaged, or not a .* \(merge thresholds hold NaN or infinity\)"
    ):
        ltmp.load(model, path)
    assert not is_attached(model)


class Code:
    """What unpickling would run."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/unpickled",)


BROKEN: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "missing": ("t.safetensors", lambda path, good: None, "no thresholds file"),
    "truncated": (
        "t.safetensors",
        lambda path, good: path.write_bytes(good.read_bytes()[:-7]) and None,
        "not a thresholds file",
    ),
    "empty": ("t.safetensors", lambda path, good: path.touch(), "not a thresholds file"),
    "text": ("t.safetensors", lambda path, good: path.write_text("hello") and None, "not a thresholds file"),
    "other-tensors": ("t.safetensors", lambda path, good: save_file({"a": torch.ones(1)}, path), "holds no thresholds"),
    "one-vector": (
        "t.safetensors",
        lambda path, good: write_tensors(path, merge=torch.ones(3)),
        "not a thresholds file",
    ),
    "missing-pth": ("t.pth", lambda path, good: None, "no checkpoint"),
    "folder": ("t.pth", lambda path, good: path.mkdir(), "holds no thresholds"),
    "text-pth": ("t.pth", lambda path, good: path.write_text("hello") and None, "not a checkpoint"),
    "empty-pth": ("t.pth", lambda path, good: path.touch(), "not a checkpoint"),
    "pickle": (
        "t.pth",
        lambda path, good: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)) and None,
        "not a checkpoint",
    ),
    "code": ("t.pth", lambda path, good: torch.save({"state_dict": Code()}, path), "nothing else is unpickled"),
    "list": ("t.pth", lambda path, good: torch.save([torch.ones(1)], path), "no state dict"),
    "whole-model": ("t.pth", lambda path, good: torch.save(tiny_vit(), path), "nothing else is unpickled"),
    "weights-only": ("t.pth", lambda path, good: torch.save(tiny_vit().state_dict(), path), "holds no thresholds"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_a_sentence(tmp_path: Path, saved: Path, name: str) -> None:
    file, write, fragment = BROKEN[name]
    path = tmp_path / "broken" / file
    path.parent.mkdir()
    write(path, saved)
    model = tiny_vit()
    with pytest.raises(LTMPError, match=fragment) as refusal:
        ltmp.load(model, path)
    assert "\n" not in str(refusal.value)
    assert str(path) in str(refusal.value)
    assert not is_attached(model)
    assert not Path("/tmp/unpickled").exists()


def test_truncated_torch_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "t.pth.tar"
    torch.save({"state_dict": tiny_vit().state_dict()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(LTMPError, match="truncated or not a checkpoint"):
        read_state_dict(path)


# -- the seed's checkpoints


def seed_keys(steps: tuple[str, ...], depth: int = 3, prefix: str = "") -> dict[str, torch.Tensor]:
    values = {"merge": MERGE, "prune": PRUNE}
    return {f"{prefix}blocks.{i}.{s}_masker.threshold": torch.tensor(values[s][i]) for s in steps for i in range(depth)}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(("steps", "variant"), [(("merge", "prune"), "ltmp"), (("merge",), "ltm"), (("prune",), "ltp")])
@pytest.mark.parametrize("key", ["state_dict", "state_dict_ema", "model", None])
def test_seed_checkpoints(tmp_path: Path, steps: tuple[str, ...], variant: str, key: str | None, prefix: str) -> None:
    state = seed_keys(steps, prefix=prefix)
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({key: state, "epoch": 1} if key else state, path)
    file = read(path)
    assert file.config.variant == variant
    assert file.merge.tolist() == pytest.approx(MERGE if "merge" in steps else [1.0] * 3)
    assert file.prune.tolist() == pytest.approx(PRUNE if "prune" in steps else [0.0] * 3)
    model = tiny_vit()
    ltmp.load(model, path)
    assert model.ltmp.config.variant == variant


def test_seed_checkpoint_does_not_say_the_order(tmp_path: Path) -> None:
    """Its keys are the same for ltmp and ltpm: the model that they are loaded into decides."""
    path = tmp_path / "t.pth"
    torch.save(seed_keys(("merge", "prune")), path)
    model = ltmp.attach(tiny_vit(), LTMPConfig(variant="ltpm"))
    ltmp.load(model, path)
    assert model.ltmp.config.variant == "ltpm"
    assert model.ltmp.merge.tolist() == pytest.approx(MERGE)


def test_seed_checkpoint_as_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file(seed_keys(("merge", "prune")), path)
    assert read(path).merge.tolist() == pytest.approx(MERGE)


def test_seed_checkpoint_is_parted_from_the_weights() -> None:
    host = tiny_vit().state_dict()
    found, weights = split_seed_state({**host, **seed_keys(("merge", "prune"))})
    assert found is not None
    assert weights.keys() == host.keys()
    assert split_seed_state(host)[0] is None


def test_a_part_of_the_steps_fits_the_whole_variant(tmp_path: Path) -> None:
    """A merge-only file on a model attached as ltmp: pruning stays off."""
    path = tmp_path / "t.pth"
    torch.save(seed_keys(("merge",)), path)
    model = ltmp.attach(tiny_vit())
    apply(model, read(path))
    assert model.ltmp.config.variant == "ltmp"
    assert model.ltmp.prune.tolist() == [0.0] * 3


@pytest.mark.parametrize("form", ["pt", "safetensors", "wrapped.pth.tar"])
def test_whole_state_dict_of_an_attached_model(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"whole.{form}"
    state = attached().state_dict()
    if form == "safetensors":
        save_file(state, path)
    else:
        wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}}
        torch.save(wrapped if "wrapped" in form else state, path)
    model = tiny_vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    file = ltmp.load(model, path)
    assert file.config.variant == "ltmp"
    assert torch.equal(model.ltmp.merge, torch.tensor(MERGE))
    assert torch.equal(model.ltmp.prune, torch.tensor(PRUNE))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("merge", "prune", "variant"),
    [(MERGE, [0.0] * 3, "ltm"), ([1.0] * 3, PRUNE, "ltp"), ([1.0] * 3, [0.0] * 3, "ltmp")],
    ids=["merging", "pruning", "nothing"],
)
def test_a_state_dict_has_the_steps_that_select_something(
    merge: list[float], prune: list[float], variant: str, tmp_path: Path
) -> None:
    model = attached()
    model.ltmp.set(merge, prune)
    torch.save(model.state_dict(), tmp_path / "whole.pt")
    assert read(tmp_path / "whole.pt").config.variant == variant
    # a model that is attached already says its variant itself
    other = ltmp.attach(tiny_vit(), LTMPConfig(variant="ltpm"))
    ltmp.load(other, tmp_path / "whole.pt")
    assert other.ltmp.config.variant == "ltpm"
    assert other.ltmp.merge.tolist() == pytest.approx(merge)


def test_weights_of_a_whole_state_dict_are_the_hosts(tmp_path: Path) -> None:
    host = tiny_vit()
    found, weights = split_thresholds(ltmp.attach(tiny_vit()).state_dict())
    assert found is not None
    assert weights.keys() == host.state_dict().keys()
    torch.save(ltmp.attach(tiny_vit(seed=1)).state_dict(), tmp_path / "whole.pt")
    load_weights(host, tmp_path / "whole.pt")
    assert torch.equal(host.head.weight, tiny_vit(seed=1).head.weight)


def test_nan_in_a_state_dict_is_said(tmp_path: Path) -> None:
    torch.save({"ltmp.merge": torch.tensor([float("nan")] * 3), "ltmp.prune": torch.zeros(3)}, tmp_path / "nan.pt")
    with pytest.raises(LTMPError, match="NaN"):
        ltmp.load(tiny_vit(), tmp_path / "nan.pt")


# -- dials


@pytest.fixture
def dialled(tmp_path: Path) -> Path:
    model = attached()
    model.ltmp.set_dial(make_dial(3))
    model.ltmp.set_budget(0.61)
    path = tmp_path / "dial" / "thresholds.safetensors"
    ltmp.save(model, path, target=0.61)
    return path


def same_dial(found: Dial | None) -> bool:
    assert found is not None
    return all(
        torch.equal(a, b) for a, b in zip(found.tensors().values(), make_dial(3).tensors().values(), strict=True)
    )


def test_a_dial_is_in_the_same_file(dialled: Path) -> None:
    model = tiny_vit()
    file = ltmp.load(model, dialled)
    assert same_dial(file.dial)
    assert same_dial(model.ltmp.dial)
    assert model.ltmp.budget == 0.61
    assert torch.equal(model.ltmp.merge, make_dial(3).at(0.61)[0])
    assert dialled.stat().st_size < 10_000
    with safe_open(dialled, framework="pt") as raw:
        assert {"merge", "prune", "dial.share", "dial.merge", "dial.prune", "dial.kept"} == set(raw.keys())


@pytest.mark.parametrize("by", ["file", "folder"])
def test_loading_at_a_budget(dialled: Path, by: str) -> None:
    model = tiny_vit()
    file = ltmp.load(model, dialled if by == "file" else dialled.parent, budget=0.4)
    merge, prune = make_dial(3).at(0.4)
    assert torch.equal(model.ltmp.merge, merge)
    assert torch.equal(file.prune, prune)
    assert model.ltmp.budget == 0.4
    model.ltmp.set_budget(0.8)
    assert model.ltmp.budget == 0.8


def test_a_plain_file_takes_the_dial_away(dialled: Path, saved: Path) -> None:
    model = tiny_vit()
    ltmp.load(model, dialled)
    ltmp.load(model, saved)
    assert model.ltmp.dial is None
    assert model.ltmp.budget is None


@pytest.mark.parametrize("budget", [0.1, 0.99, float("nan")])
def test_a_budget_out_of_reach_is_refused_and_nothing_attached(dialled: Path, budget: float) -> None:
    model = tiny_vit()
    with pytest.raises(UsageError, match=r"thresholds\.safetensors: budget .* goes from 0\.3 to 0\.95"):
        ltmp.load(model, dialled, budget=budget)
    assert not is_attached(model)


def test_a_file_without_a_dial_has_one_budget(saved: Path) -> None:
    model = tiny_vit()
    with pytest.raises(UsageError, match=r"for the budget 0\.6 alone and no dial.*docs/dial\.md"):
        ltmp.load(model, saved, budget=0.5)
    assert not is_attached(model)
    ltmp.load(model, saved, budget=0.6)
    assert torch.equal(model.ltmp.merge, torch.tensor(MERGE))


def test_saving_at_another_budget_is_loaded_there(dialled: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    ltmp.load(model, dialled)
    model.ltmp.set_budget(0.35)
    ltmp.save(model, tmp_path / "again.safetensors")
    other = tiny_vit()
    ltmp.load(other, tmp_path / "again.safetensors")
    assert other.ltmp.budget == 0.35
    model.ltmp.set([0.5] * 3)
    ltmp.save(model, tmp_path / "by-hand.safetensors")
    ltmp.load(other, tmp_path / "by-hand.safetensors")
    assert other.ltmp.budget is None
    assert other.ltmp.dial is not None


def test_annotating_keeps_the_dial(dialled: Path, tmp_path: Path) -> None:
    annotate(dialled, tmp_path / "noted.safetensors", top1=71.0)
    file = read(tmp_path / "noted.safetensors")
    assert same_dial(file.dial)
    assert file.metadata["top1"] == 71.0
    assert torch.equal(file.merge, make_dial(3).at(0.61)[0])
    annotate(dialled, tmp_path / "noted.safetensors", budget=0.4)
    file = read(tmp_path / "noted.safetensors")
    assert file.metadata["budget"] == 0.4
    assert torch.equal(file.merge, make_dial(3).at(0.4)[0])
    with pytest.raises(UsageError, match="goes from"):
        annotate(dialled, tmp_path / "no.safetensors", budget=0.1)


BROKEN_DIALS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "falling": lambda tensors: tensors.update({"dial.share": tensors["dial.share"].flip(0).contiguous()}),
    "a part": lambda tensors: tensors.pop("dial.kept"),
    "NaN": lambda tensors: tensors["dial.merge"].fill_(float("nan")),
    "other depth": lambda tensors: tensors.update(make_dial(4).tensors()),
    "flat": lambda tensors: tensors.update({"dial.prune": torch.zeros(3)}),
}


@pytest.mark.parametrize("form", ["file", "state dict"])
@pytest.mark.parametrize("name", BROKEN_DIALS)
def test_broken_dials_are_refused_in_a_sentence(dialled: Path, tmp_path: Path, name: str, form: str) -> None:
    with safe_open(dialled, framework="pt") as raw:
        tensors = {key: raw.get_tensor(key) for key in raw.keys()}  # noqa: SIM118 (not a dict)
    BROKEN_DIALS[name](tensors)
    path = tmp_path / "broken.safetensors"
    if form == "file":
        write_tensors(path, **tensors)
    else:
        save_file({f"ltmp.{key}": value for key, value in tensors.items()}, path)
    model = tiny_vit()
    with pytest.raises(LTMPError, match=r"not a thresholds file|are broken") as refusal:
        ltmp.load(model, path)
    assert "\n" not in str(refusal.value)
    assert not is_attached(model)


def test_a_file_whose_budget_is_off_its_dial_is_refused(dialled: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    ltmp.load(model, dialled)
    wrongs = {0.1: "its budget is 0.1, which its dial does not reach", "half": "budget is 'half', expected"}
    for wrong, why in wrongs.items():
        with pytest.raises(UsageError, match=f"cannot save .*: {why}"):
            ltmp.save(model, tmp_path / "off.safetensors", budget=wrong)
        with safe_open(dialled, framework="pt") as raw:
            tensors = {key: raw.get_tensor(key) for key in raw.keys()}  # noqa: SIM118 (not a dict)
            about = {**json.loads(raw.metadata()["ltmp"]), "budget": wrong}
        save_file(tensors, tmp_path / "off.safetensors", metadata={"format": FORMAT, "ltmp": json.dumps(about)})
        with pytest.raises(LTMPError, match=rf"is damaged, or not a thresholds file \({why}"):
            read(tmp_path / "off.safetensors")


def test_whole_state_dict_with_a_dial(dialled: Path, tmp_path: Path) -> None:
    model = tiny_vit()
    ltmp.load(model, dialled)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    other = tiny_vit()
    ltmp.load(other, tmp_path / "whole.safetensors", budget=0.4)
    assert same_dial(other.ltmp.dial)
    assert other.ltmp.budget == 0.4
    load_weights(tiny_vit(), tmp_path / "whole.safetensors")


@pytest.mark.parametrize(
    "scores",
    [SCORES["attention"], SCORES["best"], Scores("heads"), Scores(matching="mutual"), Scores(importance="probe"),
     Scores(size_power=0.3), Scores(class_power=0.5)],
    ids=str,
)  # fmt: skip
def test_thresholds_belong_to_the_scores_they_were_learned_with(tmp_path, scores: Scores) -> None:
    path = tmp_path / "other.safetensors"
    model = ltmp.attach(tiny_vit(), LTMPConfig(scores=scores))
    model.ltmp.set([0.5] * 3)
    model.ltmp.set_probe(make_probe(3))
    ltmp.save(model, path)
    fresh = tiny_vit()
    ltmp.load(fresh, path)
    assert fresh.ltmp.config.scores == scores
    with pytest.raises(LTMPError, match=r"learned with scores .*, but the model was attached with paper") as refusal:
        ltmp.load(ltmp.attach(tiny_vit()), path)
    assert f"LTMPConfig(scores={scores.name or scores!r})" in str(refusal.value)


def test_fixed_rates_have_scores_of_their_own() -> None:
    with pytest.raises(ValueError, match="matching and importance are for ltmp, ltpm, ltm, ltp; m has its own"):
        LTMPConfig(variant="m", r=4, scores=Scores(matching="mutual"))
    wanting = (LTMPConfig("topk", r=2), LTMPConfig(scores=Scores(class_power=0.5)))
    for config, registers in product(wanting, (0, 2)):
        model = tiny_vit(class_token=False, reg_tokens=registers, global_pool="avg")
        with pytest.raises(LTMPError, match="needs a class token's attention, and this model has no class token"):
            ltmp.attach(model, config)
