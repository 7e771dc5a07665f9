"""Thresholds on disk: a few hundred bytes of safetensors with what they were made for, or a checkpoint of the seed."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ._version import __version__
from .config import LTMPConfig
from .errors import LTMPError, UsageError
from .files import atomic_path
from .hosts.attach import attach, is_attached, stack_of, thresholds_of
from .locate import file_name, locate
from .method.dial import PREFIX as DIAL
from .method.dial import Dial
from .method.thresholds import Thresholds

FORMAT = "ltmp-thresholds"
SEED_KEY = re.compile(r"(?:module\.)?blocks\.(\d+)\.(merge|prune)_masker\.threshold")


@dataclass(frozen=True)
class ThresholdFile:
    """What a thresholds file holds.

    Attributes:
        merge, prune: float32 [L]; of fixed rates, which the config holds, thresholds that select nothing.
        config: how they were learned.
        metadata: architecture, input size, target, measured share, accuracies, package version; as far as known.
        dial: thresholds for a range of budgets, of which `merge` and `prune` are those at `metadata["budget"]`; None
            where there are these alone.
        probe: what tokens are read through where the config's scores ask for it, or None; see `ops.probe.reference`.

    Raises:
        ValueError: the dial is for another number of blocks, or does not reach the budget.
    """

    merge: Tensor
    prune: Tensor
    config: LTMPConfig = field(default_factory=LTMPConfig)
    metadata: dict[str, Any] = field(default_factory=dict)
    dial: Dial | None = None
    probe: Tensor | None = None

    def __post_init__(self) -> None:
        if self.dial is not None and self.dial.depth != self.merge.numel():
            raise ValueError(f"a dial for {self.dial.depth} blocks beside thresholds for {self.merge.numel()}")
        budget = self.metadata.get("budget")
        if self.dial is not None and budget is not None:
            try:
                self.dial.at(budget)
            except (UsageError, TypeError, ValueError) as error:
                raise ValueError(f"its budget is {budget!r}, which its dial does not reach") from error

    def at(self, budget: float, source: str = "this file") -> ThresholdFile:
        """The same with the dial's thresholds at `budget`; a file without a dial has its own budget alone.

        Raises:
            UsageError: there is no dial, or it does not go so far.
        """
        if self.dial is not None:
            try:
                merge, prune = self.dial.at(budget)
            except UsageError as error:
                raise UsageError(f"{source}: {error}") from error
            return replace(self, merge=merge, prune=prune, metadata={**self.metadata, "budget": budget})
        target = self.metadata.get("target")
        if target == budget:
            return self
        only = "one budget" if target is None else f"the budget {target:g} alone"
        raise UsageError(
            f"{source} holds thresholds for {only} and no dial, so it cannot be set to {budget:g}: leave the budget "
            "out, or make a dial with `ltmp dial` (docs/dial.md)"
        )


def describe(model: nn.Module) -> dict[str, Any]:
    """What thresholds of this model are bound to: its architecture's name and its shape."""
    stack = stack_of(model)
    known = {"depth": stack.thresholds.depth, **stack.recipe.describe(stack.host)}
    return {name: value for name, value in known.items() if value is not None}


def save(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write the thresholds of an attached model, with its dial, or its fixed rates, with what they belong to.

    Args:
        path: a `.safetensors` file; replaced whole or left alone.
        metadata: more to keep, JSON types: `target`, `share`, `top1_dense`, `top1`.

    Raises:
        LTMPError: nothing is attached, or the file cannot be written.
    """
    policy = stack_of(model).thresholds
    tensors = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    about = describe(model)
    if isinstance(policy, Thresholds) and policy.dial is not None:
        tensors |= policy.dial.tensors()
        about |= {"dial": [policy.dial.lowest, policy.dial.highest]}
        about |= {} if policy.budget is None else {"budget": policy.budget}
    if isinstance(policy, Thresholds) and policy.probe is not None and policy.config.asks_probe:
        # learned in half precision, so that nothing is lost
        tensors |= {"probe": policy.probe.half().cpu()}
    about |= {
        **metadata,
        "config": policy.config.to_dict(),
        "version": __version__,
    }
    _write(tensors, about, path)


def annotate(source: str | os.PathLike[str], path: str | os.PathLike[str], **metadata: Any) -> None:
    """Copy a thresholds file with more, or newer, metadata; a new `budget` also sets its dial.

    Raises:
        UsageError: the file has no dial for the budget.
        LTMPError: `source` is not a file that `save` wrote.
    """
    found = read(source, budget=metadata.get("budget"))
    if Path(source).suffix != ".safetensors":
        raise LTMPError(f"{source} is not safetensors: load it and write it with ltmp.save(model, PATH.safetensors)")
    with safe_open(source, framework="pt") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise LTMPError(f"{source} is a whole checkpoint: load it and write its thresholds with ltmp.save")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        about = json.loads(file.metadata()["ltmp"])
    if not found.config.method.fixed:
        tensors |= {"merge": found.merge, "prune": found.prune}
    _write(tensors, {**about, **metadata}, path)


def _write(tensors: dict[str, Tensor], about: dict[str, Any], path: str | os.PathLike[str]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": FORMAT, "ltmp": json.dumps(about)})
        except SafetensorError as error:
            raise LTMPError(f"cannot write {path}: {error}") from error


def read(path: str | os.PathLike[str], *, budget: float | None = None) -> ThresholdFile:
    """Read a thresholds file, or the thresholds in a whole checkpoint of an attached model or of the seed's training.

    Args:
        path: a file, a folder or the name of a repository; see `locate`.
        budget: FLOPs share that the file's dial is set to; None leaves it where it was saved.

    Raises:
        UsageError: the file has no dial for the budget.
        LTMPError: no such file, truncated, or no thresholds in it.
    """
    file = locate(path, budget=budget)
    found = _read(file)
    named = found.dial is None and file.name == file_name(budget)
    return found if budget is None or named else found.at(budget, source=os.fspath(path))


def _read(path: Path) -> ThresholdFile:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") == FORMAT:
                    values = json.loads(about["ltmp"])
                    config = LTMPConfig.from_dict(values.pop("config"))
                    if config.method.fixed:
                        depth = int(values["depth"])
                        return ThresholdFile(torch.ones(depth), torch.zeros(depth), config, values)
                    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                    dial, probe = Dial.find(tensors), tensors.get("probe")
                    if config.asks_probe and probe is None:
                        raise ValueError("its probe is missing")
                    return ThresholdFile(tensors["merge"], tensors["prune"], config, values, dial, probe)
        except FileNotFoundError:
            raise UsageError(f"no thresholds file {path}: give the file that `ltmp learn` wrote") from None
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise LTMPError(f"{path} is not a whole thresholds file ({error}): copy or learn it again") from error
    found = split_thresholds(read_state_dict(path))[0]
    if found is None:
        raise LTMPError(
            f"{path} holds no thresholds: expected a file that `ltmp learn` or the seed's training wrote, or the "
            "state dict of an attached model"
        )
    return found


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a checkpoint: safetensors, or torch's format read without unpickling code.

    Understands `.pth.tar` files with `state_dict` (or `state_dict_ema`, `model`) inside and `module.` prefixes.

    Raises:
        LTMPError: no such file, truncated, not a checkpoint, or one that only unpickling would read.
    """
    try:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        # timm's own checkpoints keep the command line they were made with
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"no checkpoint {path}: check the path") from None
    except pickle.UnpicklingError as error:
        raise LTMPError(
            f"{path} is not a checkpoint of plain tensors, and nothing else is unpickled: save its state_dict anew"
        ) from error
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise LTMPError(f"{path} is truncated or not a checkpoint: copy or download it again") from error
    for key in ("state_dict", "state_dict_ema", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise LTMPError(f"{path} holds no state dict: expected parameter names and tensors")
    return {key.removeprefix("module."): value for key, value in loaded.items() if isinstance(value, Tensor)}


def split_seed_state(state: dict[str, Tensor]) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Part a seed checkpoint (`blocks.N.merge_masker.threshold`) into thresholds and the host's own weights.

    Returns:
        The thresholds, or None where there are none, and everything else.
    """
    found: dict[str, dict[int, float]] = {"merge": {}, "prune": {}}
    weights = {}
    for key, value in state.items():
        match = SEED_KEY.fullmatch(key)
        if match:
            found[match[2]][int(match[1])] = float(value)
        else:
            weights[key] = value
    depth = 1 + max((block for values in found.values() for block in values), default=-1)
    if depth == 0:
        return None, weights
    merge = torch.tensor([found["merge"].get(i, 1.0) for i in range(depth)])
    prune = torch.tensor([found["prune"].get(i, 0.0) for i in range(depth)])
    variant = "ltmp" if found["merge"] and found["prune"] else "ltm" if found["merge"] else "ltp"
    return ThresholdFile(merge, prune, LTMPConfig(variant=variant)), weights


def split_thresholds(state: dict[str, Tensor]) -> tuple[ThresholdFile | None, dict[str, Tensor]]:
    """Part a whole checkpoint into thresholds, `ltmp.merge` and `ltmp.prune` or the seed's, and the host's own weights.

    A state dict does not say its variant: it is taken to have the steps that its thresholds select something for.

    Returns:
        The thresholds, or None where there are none, and everything else.

    Raises:
        LTMPError: its dial is broken.
    """
    found, weights = split_seed_state(state)
    merge, prune, probe = (weights.pop(f"ltmp.{name}", None) for name in ("merge", "prune", "probe"))
    parts = {name: weights.pop(name) for name in list(weights) if name.startswith(f"ltmp.{DIAL}")}
    if merge is None or prune is None:
        return found, weights
    merges, prunes = bool((merge < 1).any()), bool((prune > 0).any())
    variant = "ltmp" if merges == prunes else "ltm" if merges else "ltp"
    try:
        dial = Dial.find(parts, "ltmp.")
        return ThresholdFile(merge.float(), prune.float(), LTMPConfig(variant=variant), {}, dial, probe), weights
    except ValueError as error:
        raise LTMPError(f"the thresholds in this checkpoint are broken ({error}): copy or learn them again") from error


def load(
    model: nn.Module, path: str | os.PathLike[str], *, engine: str | None = None, budget: float | None = None
) -> ThresholdFile:
    """Attach (unless it is) and set the thresholds of `path`; of a whole checkpoint nothing else is taken.

    Args:
        model: the model that the thresholds were learned for.
        path: a file, a folder with one, or a repository of the Hugging Face Hub (USER/REPO); see `locate`.
        engine: overrides the file's engine.
        budget: FLOPs share to set the file's dial to; None leaves it where it was saved. `model.ltmp.set_budget` turns
            it later. Of several files in a folder or repository without a dial it says which.

    Returns:
        What was in the file.

    Raises:
        UsageError: the file has no dial for the budget; the model is unchanged.
        LTMPError: unreadable, or learned for another depth or architecture; the model is unchanged.
    """
    file = read(path, budget=budget)
    settings = {**file.config.to_dict(), **({"engine": engine} if engine else {})}
    attached = is_attached(model)
    if not attached:
        attach(model, LTMPConfig.from_dict(settings))
    try:
        apply(model, file, source=str(path))
    except LTMPError:
        if not attached:
            from .hosts.attach import detach

            detach(model)
        raise
    return file


def _fits(file: ThresholdFile, config: LTMPConfig) -> bool:
    """Whether the file's steps are those of `config` or some of them. A whole checkpoint does not say their order."""
    if file.config.method == config.method:
        return True
    if file.config.method.fixed or config.method.fixed:
        return False
    theirs, ours = set(file.config.steps), set(config.steps)
    return theirs < ours or (theirs == ours and not file.metadata)


def apply(model: nn.Module, file: ThresholdFile, source: str = "these thresholds") -> None:
    """Set an attached model's thresholds, dial and variant, after checking that they belong to it.

    Raises:
        LTMPError: another depth, width or architecture, another variant than the attached one, or NaN.
    """
    here = describe(model)
    for name, what in (("architecture", "architecture"), ("depth", "number of blocks"), ("width", "width")):
        theirs = file.merge.numel() if name == "depth" else file.metadata.get(name)
        if theirs is not None and name in here and here[name] != theirs:
            raise LTMPError(
                f"{source} was learned for {what} {theirs}, but this model's is {here[name]}: "
                "use the model it was learned on, or learn thresholds for this one"
            )
    config = stack_of(model).thresholds.config
    if not _fits(file, config):
        raise LTMPError(
            f"{source} is for variant {file.config.variant}, but the model was attached as "
            f"{config.variant}: attach with LTMPConfig(variant={file.config.variant!r})"
        )
    if config.method.fixed:
        theirs, ours = ((c.r, c.r_prune, c.schedule, c.seed) for c in (file.config, config))
        if theirs != ours:
            raise LTMPError(
                f"{source} has r={file.config.r} ({file.config.schedule}), but the model was attached with "
                f"r={config.r} ({config.schedule}): call ltmp.detach(model) before loading it"
            )
        return
    for name, theirs in file.config.scores.items():
        if theirs != config.scores[name]:
            raise LTMPError(
                f"{source} is for {name} by {theirs}, but the model was attached with {config.scores[name]}: attach "
                f"with LTMPConfig({name}={theirs!r})"
            )
    own = thresholds_of(model)
    try:
        own.set_probe(file.probe if config.asks_probe else None)
        own.set(file.merge, file.prune)
        own.set_dial(file.dial)
    except ValueError as error:
        raise LTMPError(f"{source}: {error}") from error
    own.asked = None if file.dial is None else file.metadata.get("budget")
