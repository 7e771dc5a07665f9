"""The manifest of a run: its settings and source, stored with the results so that no other run is mixed with them.

Which shards are finished is found by `run.py` from their files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..errors import LTMPError, UsageError
from ..files import atomic_path, check_writable, sweep
from ..files.text import read_json
from ..hosts.attach import attachment
from .predictor import Predictor
from .shards import Shard
from .writer import ERRORS

MANIFEST = "_run.json"
# Names of settings in messages, if not the key.
_NAMES = {"batch_size": "batch size", "class_names": "class names", "amp": "--amp", "top": "--top"}


def prepare(out: Path, sources: Sequence[str | Path], shards: Sequence[Shard]) -> None:
    """Create the output folder before any work is done, and remove unfinished files that a killed run has left.

    Raises:
        UsageError: `out` is a file, is inside the source, or holds anything but a run, or links in place of its files.
        LTMPError: `out` cannot be written.
    """
    real = out.resolve()
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in (real, *real.parents):
            raise UsageError(f"{out} lies inside the source {source}: choose an --out beside it")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: --out is a folder")
    names = [path.name for path in out.iterdir() if not path.name.startswith(".")] if out.exists() else []
    if names and MANIFEST not in names:
        raise UsageError(f"{out} holds other files, but no run to continue: choose an empty or a new folder")
    check_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    _check_regular(out, {MANIFEST, f"{ERRORS}.csv", *(f"{shard.name}.parquet" for shard in shards)}, ERRORS)
    if (out / ERRORS).exists():
        _check_regular(out / ERRORS, {f"{shard.name}.csv" for shard in shards})
        sweep(out / ERRORS)


def _check_regular(folder: Path, files: set[str], subfolder: str | None = None) -> None:
    """Refuse links and the like under the names that a run writes, as it would write through a link."""
    for entry in list(os.scandir(folder)):
        if entry.name in files and not entry.is_file(follow_symlinks=False):
            raise UsageError(f"{entry.path} is not a regular file, as runs write: remove it, or choose another --out")
        if entry.name == subfolder and not entry.is_dir(follow_symlinks=False):
            raise UsageError(f"{entry.path} is not a regular folder, as runs make: remove it, or choose another --out")


def clear(out: Path, shards: Sequence[Shard]) -> None:
    """Remove a run and nothing else; the manifest goes last, so that an interrupted call can be repeated."""
    for name in _names_of(out, shards):
        for path in (out / f"{name}.parquet", out / ERRORS / f"{name}.csv"):
            path.unlink(missing_ok=True)
    for path in (out / f"{ERRORS}.csv", out / MANIFEST):
        path.unlink(missing_ok=True)


def _names_of(out: Path, shards: Sequence[Shard]) -> list[str]:
    """Return the names of the shards in the manifest of `out`, or of this run if the manifest cannot be read."""
    try:
        names = [str(name) for name in read_json(out / MANIFEST)["source"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = [shard.name for shard in shards]
    # A forged manifest must not reach other folders.
    return [name for name in names if name == os.path.basename(name)]


def settings_of(predictor: Predictor) -> dict[str, Any]:
    """Return the settings that determine the results down to rounding, except the device.

    Settings that only affect speed are left out.
    """
    scoring, deployment = predictor.scoring, predictor.deployment
    model = deployment.model
    attached = attachment(model).policy if deployment.attached else None
    names = None if scoring.embeddings else deployment.names
    return {
        "model": type(model).__name__,
        **scoring.about,
        "weights": _digest((name, value) for name, value in model.state_dict().items() if not name.startswith("ltmp.")),
        "thresholds": _digest(attached.state_dict().items()) if attached else None,
        "method": attached.config.to_dict() if attached else None,
        "transform": " ".join(str(deployment.transform).split()),
        "embeddings": scoring.embeddings,
        "top": None if scoring.embeddings else predictor.top,
        "class_names": sha256("\n".join(names).encode()).hexdigest()[:16] if names else None,
        "batch_size": scoring.batch_size,
        "amp": scoring.amp,
    }


def _digest(tensors: Iterable[tuple[str, Any]]) -> str:
    digest = sha256()
    for name, value in sorted(tensors):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def begin(out: Path, shards: Sequence[Shard], settings: dict[str, Any]) -> None:
    """Write the manifest of this run to `out`, or check that it matches the one there.

    Raises:
        UsageError: `out` holds a run with other settings or of another source.
        LTMPError: the manifest cannot be read or written.
    """
    source = {shard.name: shard.fingerprint for shard in shards}
    path = out / MANIFEST
    if not path.exists():
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps({"ltmp": __version__, "settings": settings, "source": source}, indent=1))
        return
    try:
        earlier = read_json(path)
        earlier_settings, earlier_source = dict(earlier["settings"]), dict(earlier["source"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LTMPError(
            f"{path} cannot be read ({error}): choose another --out, or --overwrite what is there"
        ) from error
    alternatives = "choose another --out, or start over with --overwrite"
    for name, value in json.loads(json.dumps(settings)).items():
        if earlier_settings.get(name) != value:
            what = _NAMES.get(name, name)
            values = f"{_short(earlier_settings.get(name))} then, {_short(value)} now"
            raise UsageError(
                f"{out} holds a run with another {what}: {values}; continue with the earlier one, {alternatives}"
            )
    if earlier_source != source:
        difference = _difference(earlier_source, source, shards)
        raise UsageError(
            f"{out} holds a run of other images: {difference}; continue with the earlier ones, {alternatives}"
        )


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) < 40 else f"{text[:37]}..."


def _difference(before: dict[str, str], now: dict[str, str], shards: Sequence[Shard]) -> str:
    if len(before) != len(now):
        return f"{len(before)} shards then, {len(now)} now"
    changed = next(shard for shard in shards if before.get(shard.name) != shard.fingerprint)
    return f"{changed.source} has changed since"
