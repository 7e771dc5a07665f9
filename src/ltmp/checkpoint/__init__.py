"""Thresholds on disk: a few KB of safetensors with what they were made for, or a checkpoint of the seed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .._moved import names_moved_from
from .._version import __version__
from ..config import LTMPConfig
from ..errors import LTMPError, UsageError, first_line
from ..files.tensors import read_header, read_state_dict, read_tensors, write_tensors
from ..files.text import read_json
from ..hosts.attach import attach, attachment, detach, is_attached, thresholds_of
from ..locate import BUNDLE, file_name, locate
from ..method.thresholds import Thresholds
from .contents import ThresholdFile, from_parts, is_threshold, split_thresholds
from .describe import MODEL_FACTS, facts_of, note
from .interrupts import uninterrupted
from .metadata import Metadata
from .schema import MAX_METADATA_BYTES, check_entries, is_part, metadata_in

FORMAT = "ltmp-thresholds"
SUFFIX = ".safetensors"
__getattr__ = names_moved_from("checkpoint")


def save(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write the thresholds of an attached model, with its dial, or its fixed rates, with all that the next one needs.

    That is what the model says of itself (architecture, library, input size, class count and names, preprocessing), and
    what learning or loading found out (target, share, the folders' class names, how images were prepared).

    Args:
        path: a `.safetensors` file; replaced whole or left alone.
        metadata: more to keep, or other than was found: see `ltmp.about.Metadata`; other names may have JSON values.

    Raises:
        UsageError: a path with another ending.
        LTMPError: nothing is attached, or the file cannot be written.
    """
    if Path(path).suffix != SUFFIX:
        raise UsageError(f"{path}: thresholds are saved as safetensors, give a name that ends in {SUFFIX}")
    policy = attachment(model).policy
    tensors = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    about = facts_of(model)
    if isinstance(policy, Thresholds) and policy.dial is not None:
        tensors |= policy.dial.tensors()
        about |= {"dial": [policy.dial.lowest, policy.dial.highest]}
        about |= {} if policy.budget is None else {"budget": policy.budget}
    if isinstance(policy, Thresholds) and policy.probe is not None and policy.config.needs_probe:
        # learned in half precision, so that nothing is lost
        tensors |= {"probe": policy.probe.half().cpu()}
    if isinstance(policy, Thresholds) and policy.seen is not None:
        tensors |= {"seen": policy.seen.keys}
    if isinstance(policy, Thresholds) and policy.certificate is not None:
        about |= {"certificate": policy.certificate.to_dict()}
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
    about = read_header(source)[1]
    if about.get("format") != FORMAT:
        raise LTMPError(f"{source} is a whole checkpoint: load it and write its thresholds with ltmp.save")
    tensors, said = read_tensors(source, is_part), metadata_in(about)
    if not found.config.method.fixed:
        tensors |= {"merge": found.merge, "prune": found.prune}
    _write(tensors, {**said, **metadata}, path)


def _write(tensors: dict[str, Tensor], about: dict[str, Any], path: str | os.PathLike[str]) -> None:
    try:
        from_parts(tensors, dict(about))
    except ValueError as error:
        raise UsageError(f"cannot save {path}: {first_line(error)}") from error
    write_tensors(tensors, path, {"format": FORMAT, "ltmp": json.dumps(about)})


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
    found = _with_bundle(_read(file), file.with_name(BUNDLE))
    named = found.dial is None and file.name == file_name(budget)
    return found if budget is None or named else found.at(budget, source=os.fspath(path))


def _with_bundle(file: ThresholdFile, beside: Path) -> ThresholdFile:
    """The same with what a bundle says of its model, which people may have changed since."""
    if not beside.is_file():
        return file
    try:
        said = Metadata.from_dict(read_json(beside, 4 * MAX_METADATA_BYTES)).to_dict()
        return replace(file, metadata={**file.metadata, **{k: v for k, v in said.items() if k in MODEL_FACTS}})
    except (OSError, ValueError) as error:
        raise LTMPError(f"{beside} is no description of a model ({first_line(error)[:200]}): pack it again") from error


def _read(path: Path) -> ThresholdFile:
    if path.suffix == SUFFIX:
        try:
            entries, about = read_header(path)
            if about.get("format") == FORMAT:
                check_entries(entries)
                return from_parts(read_tensors(path, is_part), metadata_in(about))
        except FileNotFoundError:
            raise UsageError(f"no thresholds file {path}: give the file that `ltmp learn` wrote") from None
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise LTMPError(
                f"{path} is not a whole thresholds file ({first_line(error)[:200]}): copy or learn it again"
            ) from error
    found = split_thresholds(read_state_dict(path, keep=is_threshold), os.fspath(path))[0]
    if found is None:
        raise LTMPError(
            f"{path} holds no thresholds: expected a file that `ltmp learn` or the seed's training wrote, or the "
            "state dict of an attached model"
        )
    return found


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    budget: float | None = None,
    certified: bool = False,
    amp: torch.dtype | None = None,
) -> ThresholdFile:
    """Attach (unless it is) and set the thresholds of `path`; of a whole checkpoint nothing else is taken.

    Args:
        model: the model that the thresholds were learned for.
        path: a file, a folder with one, or a repository of the Hugging Face Hub (USER/REPO); see `locate`.
        engine: what runs the model; None takes the file's, or the one that the model was attached with.
        budget: FLOPs share to set the file's dial to; None leaves it where it was saved. `model.ltmp.set_budget` turns
            it later. Of several files in a folder or repository without a dial it says which.
        certified: set the dial to the budget that the file's certificate guarantees (`ltmp.certify`), after checking
            that it is of these thresholds, this model's weights and this precision.
        amp: with `certified`, the autocast type that the model will run under.

    Returns:
        What was in the file.

    Raises:
        UsageError: the file has no dial for the budget, or no certificate; the model is unchanged.
        LTMPError: unreadable, learned for another depth or architecture, or the certificate is void; the model is
            unchanged.
    """
    if certified and budget is not None:
        raise UsageError(f"a budget of {budget:g} and the certified one: ask for one of them")
    file = read(path, budget=budget)
    if certified:
        file = file.certified(model, str(path), amp)
    attached = is_attached(model)
    # a model that is half attached could not be loaded again
    with uninterrupted():
        try:
            if not attached:
                attach(model, file.config)
            apply(model, file, source=str(path), engine=engine)
            note(model, file.metadata)
        except BaseException:
            if not attached:
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


def _limited(file: LTMPConfig, own: LTMPConfig, source: str) -> LTMPConfig:
    """`own` with the file's floor and ceiling, where it has none itself.

    Raises:
        LTMPError: both have one, and not the same.
    """
    limits = {}
    for name, none in (("floor", LTMPConfig.floor), ("ceiling", LTMPConfig.ceiling)):
        theirs, ours = getattr(file, name), getattr(own, name)
        if theirs not in (none, ours) and ours != none:
            raise LTMPError(
                f"{source} has {name} {theirs}, but the model was attached with {name} {ours}: attach with "
                f"LTMPConfig({name}={theirs}), or without one, which takes the file's"
            )
        limits[name] = theirs if ours == none else ours
    try:
        return replace(own, **limits)
    except ValueError as error:
        raise LTMPError(f"{source} does not go with how the model was attached ({error}): attach anew") from error


def _with_engine(config: LTMPConfig, engine: str) -> LTMPConfig:
    try:
        return replace(config, engine=engine)
    except ValueError as error:
        raise UsageError(str(error)) from error


def apply(model: nn.Module, file: ThresholdFile, source: str = "these thresholds", engine: str | None = None) -> None:
    """Set an attached model's thresholds, dial and variant, after checking that they belong to it.

    The model keeps the engine, floor and ceiling that it was attached with; a floor or ceiling that it has not is the
    file's.

    Args:
        engine: replaces the engine that the model was attached with.

    Raises:
        LTMPError: another depth, width or architecture, another variant, floor or ceiling than those attached, or NaN.
    """
    here = attachment(model).describe()
    for name, what in (("architecture", "architecture"), ("depth", "number of blocks"), ("width", "width")):
        theirs = file.merge.numel() if name == "depth" else file.metadata.get(name)
        if theirs is not None and name in here and here[name] != theirs:
            raise LTMPError(
                f"{source} was learned for {what} {theirs}, but this model's is {here[name]}: "
                "use the model it was learned on, or learn thresholds for this one"
            )
    policy = attachment(model).policy
    config = _limited(file.config, policy.config, source)
    if engine is not None:
        config = _with_engine(config, engine)
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
        policy.config = config
        return
    if file.config.scores not in config.scores.choices:
        raise LTMPError(
            f"{source} was learned with scores {file.config.scores}, but the model was attached with {config.scores}: "
            f"attach with LTMPConfig(scores={file.config.scores.name or file.config.scores!r})"
        )
    own = thresholds_of(model)
    try:
        own.set_probe(file.probe if config.needs_probe else None)
        own.set(file.merge, file.prune)
        own.set_dial(file.dial)
    except ValueError as error:
        raise LTMPError(f"{source}: {error}") from error
    own.config = replace(config, scores=file.config.scores)
    own.asked = None if file.dial is None else file.metadata.get("budget")
    own.seen, own.certificate = file.seen, None
    # thresholds work without it, and whoever asks for it is told what is wrong
    with suppress(LTMPError):
        own.certificate = file.certificate
