"""Where a thresholds file lies: given by itself, by its folder, or by the name of a Hugging Face repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import LTMPError, UsageError, first_line

PREFIX = "hf-hub:"
"""Before a name it says that nothing on this machine is meant, as in timm and open_clip."""

FILES = "thresholds*.safetensors"
"""What is looked for in a folder or a repository; nothing else of it is downloaded."""

DIAL = "thresholds-dial.safetensors"
"""What a file with a dial, for a whole range of budgets, is called in a repository."""

BUNDLE = "bundle.json"
"""Beside thresholds: what is said of their model, for people to read and to change."""

_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>.+\.safetensors))?")


_SUFFIXES = {".safetensors", ".pth", ".pt", ".tar", ".bin", ".ckpt"}
"""A path that ends so is a file's, also where it is missing: no repository is asked for it."""


def file_name(budget: float | None) -> str:
    """File name of the thresholds for a budget in a repository."""
    return "thresholds.safetensors" if budget is None else f"thresholds-{budget:g}.safetensors"


def locate(source: str | os.PathLike[str], *, budget: float | None = None, **hub: Any) -> Path:
    """The file that `source` names.

    Args:
        source: a file; a folder with `thresholds*.safetensors` inside; or a repository of the Hugging Face Hub,
            USER/REPO or hf-hub:USER/REPO, where needed with @REVISION behind it, and with hf-hub: also /FILE. What is
            here comes first. A repository that was loaded once is found without a network, too.
        budget: which of several files in a folder or repository: the one learned for this target, or else the one with
            a dial. A single file is taken whatever its budget: its reader knows whether it has a dial.
        hub: more for huggingface_hub's download: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        Its path; where nothing says that a repository is meant, `source` itself, existing or not.

    Raises:
        UsageError: no file or several in the folder or repository, or none for this budget.
        LTMPError: no such repository, revision or file there, no permission, or no network and nothing in the cache.
    """
    path, text = Path(source), os.fspath(source)
    if path.is_dir():
        return _choose(path, budget, where=text)
    named = _NAME.fullmatch(text.removeprefix(PREFIX))
    if path.exists() or (not text.startswith(PREFIX) and (named is None or path.suffix in _SUFFIXES)):
        return path
    if named is None:
        raise UsageError(f"{text}: expected {PREFIX}USER/REPO, where needed with @REVISION or /FILE.safetensors")
    if named["revision"]:
        hub["revision"] = named["revision"]
    folder = download(named["repo"], [named["file"] or FILES], **hub)
    if not named["file"]:
        return _choose(folder, budget, where=PREFIX + text.removeprefix(PREFIX))
    if not (folder / named["file"]).exists():
        raise LTMPError(f"the repository {named['repo']} has no file {named['file']}: check the name")
    return folder / named["file"]


def _choose(folder: Path, budget: float | None, where: str) -> Path:
    found = sorted(path.name for path in folder.glob(FILES))
    names = () if budget is None else (file_name(budget), DIAL)
    wanted = found if len(found) == 1 else [name for name in names if name in found]
    if wanted:
        return folder / wanted[0]
    if not found:
        raise UsageError(f"{where} holds no {FILES}: give a folder or repository with thresholds, or a file")
    which = "several thresholds" if budget is None else f"no {file_name(budget)} among its thresholds"
    raise UsageError(
        f"{where} holds {which} ({', '.join(found)}): name one, such as {where}/{found[0]} (budget= in Python)"
    )


def download(repo: str, patterns: list[str], **hub: Any) -> Path:
    """The folder in the cache where the matching files of a repository are, downloaded where they are new.

    Raises:
        LTMPError: as `locate`.
    """
    from huggingface_hub import snapshot_download

    with told(repo):
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))


@contextmanager
def told(repo: str) -> Iterator[None]:
    """Report what goes wrong between here and a repository in one sentence.

    Raises:
        UsageError: `repo` is no name of a repository.
        LTMPError: not there, no permission, or no network.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UsageError(f"{repo} is no name of a repository: expected USER/REPO") from error
    except errors.RevisionNotFoundError as error:
        raise LTMPError(f"the repository {repo} has no such revision: check its name") from error
    except errors.RepositoryNotFoundError as error:
        raise LTMPError(
            f"{repo} is neither here nor a Hugging Face repository that you may see: check the name, or log in with "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise LTMPError(
            f"{repo} is neither here nor in the cache, and the Hugging Face Hub cannot be reached: connect, or copy "
            "the file here"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = "log in with `hf auth login` as one who may" if status in (401, 403) else "try again later"
        raise LTMPError(f"the Hugging Face Hub refuses {repo} with {status} ({first_line(error)}): {hint}") from error
    # the library of its connections, and so their errors, differ between versions
    except Exception as error:
        if isinstance(error, LTMPError):
            raise
        raise LTMPError(f"cannot reach {repo} on the Hugging Face Hub ({first_line(error)}): connect first") from error
