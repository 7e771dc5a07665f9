"""Save and load thresholds files, and read thresholds from full checkpoints, those of the paper's code included.

A thresholds file is a few kilobytes of safetensors: the thresholds, and metadata of the model they were learned for.
"""

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
from .describe import MODEL_FACTS, collect_metadata, note
from .interrupts import uninterrupted
from .metadata import Metadata
from .schema import MAX_METADATA_BYTES, check_entries, is_part, metadata_in

FORMAT = "ltmp-thresholds"
SUFFIX = ".safetensors"
__getattr__ = names_moved_from("checkpoint")


def save(model: nn.Module, path: str | os.PathLike[str], **metadata: Any) -> None:
    """Write the thresholds of an attached model, with its dial, or its fixed rates, and everything needed to use them.

    That includes the model's own metadata (architecture, library, input size, number and names of classes,
    preprocessing) and what was recorded when the thresholds were learned or loaded (target, measured share, class names
    from the folders, how images were prepared).

    Args:
        path: a `.safetensors` file, written atomically.
        metadata: entries to add or override: fields of `ltmp.checkpoint.metadata.Metadata`, or other names with JSON
            values.

    Raises:
        UsageError: the path does not end in `.safetensors`.
        LTMPError: nothing is attached, or the file cannot be written.
    """
    if Path(path).suffix != SUFFIX:
        raise UsageError(f"{path}: thresholds are saved as safetensors, give a name that ends in {SUFFIX}")
    policy = attachment(model).policy
    tensors = {name: p.detach().cpu().contiguous() for name, p in policy.named_parameters()}
    about = collect_metadata(model)
    if isinstance(policy, Thresholds):
        if policy.dial is not None:
            tensors |= policy.dial.tensors()
            about["dial"] = [policy.dial.lowest, policy.dial.highest]
            about |= {} if policy.budget is None else {"budget": policy.budget}
        if policy.probe is not None and policy.config.needs_probe:
            # it was learned in half precision, so nothing is lost
            tensors["probe"] = policy.probe.half().cpu()
        if policy.seen is not None:
            tensors["seen"] = policy.seen.keys
        if policy.certificate is not None:
            about["certificate"] = policy.certificate.to_dict()
    about |= {
        **metadata,
        "config": policy.config.to_dict(),
        "version": __version__,
    }
    _write(tensors, about, path)


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    engine: str | None = None,
    budget: float | None = None,
    certified: bool = False,
    amp: torch.dtype | None = None,
) -> ThresholdFile:
    """Set the thresholds of a model from `path`, attaching to it first if necessary.

    From a full checkpoint only the thresholds are loaded.

    Args:
        model: the model that the thresholds were learned for.
        path: a file, a folder with one, or a repository of the Hugging Face Hub (USER/REPO); see `locate`.
        engine: the engine to run with; None keeps the one the model was attached with, or takes the file's if it was
            not attached.
        budget: FLOPs share to set the file's dial to; None leaves it where it was saved. It can be changed later with
            `model.ltmp.set_budget`. If a folder or repository has several files without a dial, it selects one.
        certified: set the dial to the budget that the file's certificate guarantees (`ltmp.certify`), after checking
            that the certificate belongs to these thresholds, this model's weights and this precision.
        amp: with `certified`, the autocast dtype that the model will run under.

    Returns:
        The contents of the file.

    Raises:
        UsageError: the file has no dial for the budget, or no certificate; the model is unchanged.
        LTMPError: the file is unreadable, its thresholds were learned for another depth or architecture, or the
            certificate is void; the model is unchanged.
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


def read(path: str | os.PathLike[str], *, budget: float | None = None) -> ThresholdFile:
    """Read a thresholds file, or the thresholds in a full checkpoint of an attached model or of the paper's code.

    Args:
        path: a file, a folder or the name of a repository; see `locate`.
        budget: FLOPs share to set the file's dial to; None leaves it where it was saved.

    Raises:
        UsageError: the file has no dial for the budget.
        LTMPError: there is no such file, it is truncated, or it holds no thresholds.
    """
    file = locate(path, budget=budget)
    contents = _with_bundle_metadata(_read_file(file), file.with_name(BUNDLE))
    chosen_by_name = contents.dial is None and file.name == file_name(budget)
    return contents if budget is None or chosen_by_name else contents.at(budget, source=os.fspath(path))


def apply(model: nn.Module, file: ThresholdFile, source: str = "these thresholds", engine: str | None = None) -> None:
    """Set an attached model's thresholds, dial and variant, after checking that they belong to it.

    The model keeps the engine, floor and ceiling that it was attached with; a floor or ceiling that it does not have is
    taken from the file.

    Args:
        source: names the file in error messages.
        engine: replaces the engine that the model was attached with.

    Raises:
        LTMPError: the thresholds are for another depth, width or architecture, or for another variant, floor or ceiling
            than the model was attached with, or contain NaN.
    """
    _check_model(model, file, source)
    policy = attachment(model).policy
    config = _merged_limits(file.config, policy.config, source)
    if engine is not None:
        config = _with_engine(config, engine)
    if not _same_steps(file, config):
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
    thresholds = thresholds_of(model)
    try:
        thresholds.set_probe(file.probe if config.needs_probe else None)
        thresholds.set(file.merge, file.prune)
        thresholds.set_dial(file.dial)
    except ValueError as error:
        raise LTMPError(f"{source}: {error}") from error
    thresholds.config = replace(config, scores=file.config.scores)
    thresholds.requested_budget = None if file.dial is None else file.metadata.get("budget")
    thresholds.seen, thresholds.certificate = file.seen, None
    # thresholds work without a certificate; a broken one is reported when it is used
    with suppress(LTMPError):
        thresholds.certificate = file.certificate


def annotate(source: str | os.PathLike[str], path: str | os.PathLike[str], **metadata: Any) -> None:
    """Copy a thresholds file and add or replace metadata; a new `budget` also sets its dial.

    Raises:
        UsageError: the file has no dial for the budget.
        LTMPError: `source` is not a file that `save` wrote.
    """
    contents = read(source, budget=metadata.get("budget"))
    if Path(source).suffix != SUFFIX:
        raise LTMPError(f"{source} is not safetensors: load it and write it with ltmp.save(model, PATH.safetensors)")
    header = read_header(source)[1]
    if header.get("format") != FORMAT:
        raise LTMPError(f"{source} is a full checkpoint: load it and write its thresholds with ltmp.save")
    tensors = read_tensors(source, is_part)
    if not contents.config.method.fixed:
        tensors |= {"merge": contents.merge, "prune": contents.prune}
    _write(tensors, {**metadata_in(header), **metadata}, path)


def _write(tensors: dict[str, Tensor], about: dict[str, Any], path: str | os.PathLike[str]) -> None:
    try:
        from_parts(tensors, dict(about))
    except ValueError as error:
        raise UsageError(f"cannot save {path}: {first_line(error)}") from error
    write_tensors(tensors, path, {"format": FORMAT, "ltmp": json.dumps(about)})


def _read_file(path: Path) -> ThresholdFile:
    if path.suffix == SUFFIX:
        try:
            entries, header = read_header(path)
            if header.get("format") == FORMAT:
                check_entries(entries)
                return from_parts(read_tensors(path, is_part), metadata_in(header))
        except FileNotFoundError:
            raise UsageError(f"no thresholds file {path}: give the file that `ltmp learn` wrote") from None
        except (SafetensorError, OSError, RuntimeError, ValueError, MemoryError) as error:
            raise LTMPError(
                f"{path} is damaged, or not a thresholds file ({first_line(error)[:200]}): copy or learn it again"
            ) from error
    contents = split_thresholds(read_state_dict(path, keep=is_threshold), os.fspath(path))[0]
    if contents is None:
        raise LTMPError(
            f"{path} holds no thresholds: expected a file that `ltmp learn` or the paper's code wrote, or the state "
            "dict of an attached model"
        )
    return contents


def _with_bundle_metadata(file: ThresholdFile, bundle: Path) -> ThresholdFile:
    """The file with the model's metadata from a bundle's JSON, if there is one: users may have edited it since."""
    if not bundle.is_file():
        return file
    try:
        edited = Metadata.from_dict(read_json(bundle, 4 * MAX_METADATA_BYTES)).to_dict()
        facts = {name: value for name, value in edited.items() if name in MODEL_FACTS}
        return replace(file, metadata={**file.metadata, **facts})
    except (OSError, ValueError) as error:
        raise LTMPError(f"{bundle} does not describe a model ({first_line(error)[:200]}): pack it again") from error


def _check_model(model: nn.Module, file: ThresholdFile, source: str) -> None:
    """Refuse thresholds that were learned for another architecture, depth or width."""
    actual = attachment(model).describe()
    for name, label in (("architecture", "architecture"), ("depth", "number of blocks"), ("width", "width")):
        expected = file.merge.numel() if name == "depth" else file.metadata.get(name)
        if expected is not None and name in actual and actual[name] != expected:
            raise LTMPError(
                f"{source} was learned for {label} {expected}, but this model's is {actual[name]}: "
                "use the model it was learned on, or learn thresholds for this one"
            )


def _merged_limits(file: LTMPConfig, attached: LTMPConfig, source: str) -> LTMPConfig:
    """The config that the model was attached with, plus the file's floor and ceiling if the model has none.

    Raises:
        LTMPError: both have one, and they differ.
    """
    limits = {}
    for name, unset in (("floor", LTMPConfig.floor), ("ceiling", LTMPConfig.ceiling)):
        theirs, ours = getattr(file, name), getattr(attached, name)
        if theirs not in (unset, ours) and ours != unset:
            raise LTMPError(
                f"{source} has {name} {theirs}, but the model was attached with {name} {ours}: attach with "
                f"LTMPConfig({name}={theirs}), or without a {name} to use the file's"
            )
        limits[name] = theirs if ours == unset else ours
    try:
        return replace(attached, **limits)
    except ValueError as error:
        raise LTMPError(
            f"{source} does not go with how the model was attached ({error}): call ltmp.detach(model) and attach again"
        ) from error


def _with_engine(config: LTMPConfig, engine: str) -> LTMPConfig:
    try:
        return replace(config, engine=engine)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _same_steps(file: ThresholdFile, config: LTMPConfig) -> bool:
    """Whether the file has the steps of `config`, or some of them.

    A full checkpoint has no metadata and does not record the order of its steps, so there any order is accepted.
    """
    if file.config.method == config.method:
        return True
    if file.config.method.fixed or config.method.fixed:
        return False
    theirs, ours = set(file.config.steps), set(config.steps)
    return theirs < ours or (theirs == ours and not file.metadata)
