"""Write files atomically: they appear complete or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import LTMPError

LOCK = ".lock"
"""Name of the lock file in a run's folder."""

_TEMPORARY_NAME = re.compile(r"\..*\.[0-9a-f]{8}\.ltmp-tmp", re.DOTALL)
"""Names of temporary files and folders, see `_temporary_beside`."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block ends without an error.

    Links are followed. A special file (a device, a pipe) is never replaced: the content is copied into it when the
    block ends. Temporary files that killed processes left in the folder are removed.

    >>> with atomic_path("table.json") as temporary:
    ...     temporary.write_text(text)

    Raises:
        LTMPError: the folder cannot be written or the disk is full; `path` is unchanged, and no new folder remains.
    """
    path = Path(path)
    try:
        if _is_special(path):
            with tempfile.TemporaryDirectory() as folder:
                temporary = Path(folder) / "content"
                temporary.touch()
                yield temporary
                with temporary.open("rb") as content, path.open("wb") as special:
                    shutil.copyfileobj(content, special)
            return
        # links among the parents are left to the system: /proc/self/fd/N may resolve to a name that does not exist
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        with _parents(target), _temporary_beside(target, _create_file) as temporary:
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            # safetensors replaces the file by its own, readable by this user only
            temporary.chmod(mode)
            temporary.replace(target)
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error


class _DryRunError(Exception):
    """Ends a trial save before it writes anything."""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Check, before any work is done, that files can be written to a folder; nothing is left behind.

    Raises:
        LTMPError: as `atomic_path`.
    """
    path = Path(folder) / "file"
    try:
        with suppress(_DryRunError), _parents(path), _temporary_beside(path, _create_file):
            raise _DryRunError
    except OSError as error:
        raise LTMPError(_explain(path.parent, error)) from error


def check_file_writable(path: str | os.PathLike[str]) -> None:
    """Check, before any work is done, that `atomic_path(path)` would succeed; nothing is written.

    Raises:
        LTMPError: as `atomic_path`.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if _is_special(path) and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error
    with suppress(_DryRunError), atomic_path(path):
        raise _DryRunError


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is "-" or names the file or stream that stdout is connected to."""
    try:
        return os.fspath(path) == "-" or os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # no such file, or a stdout without a file descriptor
        return False


def short_stem(path: Path) -> str:
    """The stem of a file name, cut so that a longer suffix fits: file systems allow 255 bytes."""
    return os.fsdecode(os.fsencode(path.stem)[:200])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder for the duration of the block: two runs in one folder would overwrite each other's files.

    The lock ends with the process, even if it is killed. Does nothing on Windows.

    Raises:
        LTMPError: another process holds the lock, or the lock file cannot be opened.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    try:
        # neither truncated nor followed: a link could lead anywhere
        file = open(  # noqa: SIM115 - closed below; this block is for errors of opening only
            os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+b", buffering=0
        )
    except OSError as error:
        raise LTMPError(
            f"cannot lock {folder}: {folder / LOCK} cannot be opened ({error.strerror}): remove it, or choose another "
            "--out"
        ) from error
    with file:
        try:
            # unlike flock, not inherited by the decoding processes, which outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise LTMPError(f"another run is writing to {folder}: wait for it, or choose another --out") from error
        yield


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `atomic_path` for formats of several files: yield a path of the same name in a temporary folder beside it.

    When the block ends, all files in that folder are moved beside `path`; `path` itself comes last, so that it never
    refers to a file that is not there yet.

    Raises:
        LTMPError: as `atomic_path`.
    """
    path = Path(path)
    try:
        with _parents(path), _temporary_beside(path, Path.mkdir) as folder:
            yield folder / path.name
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Create the parent folders of `path`, and remove the new ones again if the block fails."""
    created = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in created:
            # another process may have written there in the meantime
            with suppress(OSError):
                folder.rmdir()
        raise


def _is_special(path: Path) -> bool:
    """Whether `path` exists and is neither a regular file nor a folder, or is an open file that was unlinked."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    linked = os.path.exists(os.path.realpath(path))
    return not (linked and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)))


@contextmanager
def _temporary_beside(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a temporary file or folder beside `path`, removed at the end.

    It is created like any other file, so the umask applies, and stays locked as long as this process lives: `sweep`
    removes unlocked ones as leftovers.
    """
    sweep(path.parent)
    while True:
        # cut, since file names are limited to 255 bytes
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.ltmp-tmp")
        create(temporary)
        lock = _lock(temporary, wait=True)
        # another process may have swept it before it was locked: then create a new one
        if temporary.exists():
            break
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _create_file(path: Path) -> None:
    """Create a file that must not exist; links are not followed."""
    path.touch(exist_ok=False)


def sweep(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder; does nothing on systems without file locks."""
    for entry in os.scandir(folder):
        if _TEMPORARY_NAME.fullmatch(entry.name) and not entry.is_symlink():
            lock = _lock(Path(entry.path), wait=False)
            if lock is not None:
                _remove(Path(entry.path))
                os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """Lock a file or folder and return its descriptor; None if another process holds it or there are no file locks."""
    descriptor = None
    try:
        import fcntl

        # opening a pipe of such a name must not block
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _explain(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return f"cannot save {path}: the disk is full; free some space or choose another place with --out"
    reason = error.strerror or str(error)
    return f"cannot write {path}: {reason}; choose a folder that you may write to"
