"""Find a thresholds file by its path, its folder, or the name of a Hugging Face repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LTMPError, UsageError, first_line

PREFIX = "hf-hub:"
"""Prefix of a repository name that rules out local paths, as in timm and open_clip."""

FILES = "thresholds*.safetensors"
"""Pattern of thresholds files in a folder or repository; only matching files are downloaded."""

DIAL = "thresholds-dial.safetensors"
"""Name in a repository of a file with a dial, which covers a range of budgets."""

BUNDLE = "bundle.json"
"""File beside the thresholds with their model's metadata, for users to read and edit."""

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+\.safetensors))?")

_SUFFIXES = {".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt"}
"""A path with one of these suffixes is a file, even if it is missing, and never a repository."""


def file_name(budget: float | None) -> str:
    """Name in a repository of the thresholds file for a budget."""
    return "thresholds.safetensors" if budget is None else f"thresholds-{budget:g}.safetensors"


def locate(source: str | os.PathLike[str], *, budget: float | None = None, **hub: Any) -> Path:
    """Return the path of the thresholds file that `source` names, downloading it if necessary.

    Args:
        source: a file; a folder with `thresholds*.safetensors` inside; or a repository of the Hugging Face Hub,
            USER/REPO or hf-hub:USER/REPO, optionally followed by @REVISION, and with hf-hub: also by /FILE. Local paths
            take precedence. A repository that was loaded before is also found without a network.
        budget: selects one of several files in a folder or repository: the one learned for this target, or else the one
            with a dial. A single file is returned whatever its budget: its reader checks for a dial.
        hub: further arguments of huggingface_hub's download: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        The path of the file; `source` itself, existing or not, if it does not look like a repository.

    Raises:
        UsageError: the folder or repository has no file, several, or none for this budget.
        LTMPError: there is no such repository, revision or file, no permission, or no network and nothing in the cache.
    """
    path, text = Path(source), os.fspath(source)
    if path.is_dir():
        return _choose(path, budget, source=text)
    name = _NAME.fullmatch(text.removeprefix(PREFIX))
    if path.exists() or (not text.startswith(PREFIX) and (name is None or path.suffix in _SUFFIXES)):
        return path
    if name is None:
        raise UsageError(f"{text}: expected {PREFIX}USER/REPO, optionally with @REVISION or /FILE.safetensors")
    if name["revision"]:
        hub["revision"] = name["revision"]
    folder = download(name["repo"], [name["file"] or FILES], **hub)
    if not name["file"]:
        return _choose(folder, budget, source=PREFIX + text.removeprefix(PREFIX))
    if not (folder / name["file"]).exists():
        raise LTMPError(f"the repository {name['repo']} has no file {name['file']}: check the name")
    return folder / name["file"]


def _choose(folder: Path, budget: float | None, source: str) -> Path:
    """The only thresholds file in a folder, or the one for the budget."""
    files = sorted(path.name for path in folder.glob(FILES))
    if len(files) == 1:
        return folder / files[0]
    preferred = () if budget is None else (file_name(budget), DIAL)
    for name in preferred:
        if name in files:
            return folder / name
    if not files:
        raise UsageError(f"{source} holds no {FILES}: give a folder or repository with thresholds, or a file")
    which = "several thresholds" if budget is None else f"no {file_name(budget)} among its thresholds"
    raise UsageError(
        f"{source} holds {which} ({', '.join(files)}): name one, such as {source}/{files[0]} (budget= in Python)"
    )


def download(repo: str, patterns: list[str], **hub: Any) -> Path:
    """Download the matching files of a repository, unless they are cached, and return their folder in the cache.

    Raises:
        LTMPError: as `locate`.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(repo):
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn errors of the Hugging Face Hub or the network into LTMPErrors of one sentence.

    Raises:
        UsageError: `repo` is not a valid repository name.
        LTMPError: there is no such repository, no permission, or no network.
    """
    from huggingface_hub import errors

    try:
        yield
    except LTMPError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"{repo} is not the name of a repository: expected USER/REPO") from error
    except errors.RevisionNotFoundError as error:
        raise LTMPError(f"the repository {repo} has no such revision: check its name") from error
    except errors.RepositoryNotFoundError as error:
        raise LTMPError(
            f"{repo} is neither a local path nor a Hugging Face repository that you can access: check the name, or log "
            "in with `hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise LTMPError(
            f"{repo} is neither a local path nor in the cache, and the Hugging Face Hub cannot be reached: connect, or "
            "copy the file here"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login` as a user who has access" if status in (401, 403) else "try again later"
        raise LTMPError(f"the Hugging Face Hub refuses {repo} with {status} ({first_line(error)}): {hint}") from error
    # huggingface_hub changed its HTTP library, so the type of network errors depends on the version
    except Exception as error:
        raise LTMPError(f"cannot reach {repo} on the Hugging Face Hub ({first_line(error)}): connect first") from error
