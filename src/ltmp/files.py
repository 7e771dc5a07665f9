"""Files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import LTMPError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    >>> with atomic_path("table.json") as temporary:
    ...     temporary.write_text(text)

    Raises:
        LTMPError: the folder cannot be written or the disk is full; `path` is as it was.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        # mkstemp makes private files; a result is as readable as any other file of this user
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`path` in a temporary folder beside it, for formats of more than one file: all move over when the block ends.

    The files beside `path` go first, so that it never names one that is not there. Raises like `atomic_path`.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            for file in sorted(Path(folder).iterdir(), key=lambda file: file == temporary):
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error


def _explain(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"cannot save {path}: the disk is full; free some space or choose another place with --out"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; choose a folder that you may write to"
