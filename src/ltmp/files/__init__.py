"""Files appear whole or not at all."""

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

_OURS = re.compile(r"\..*\.[0-9a-f]{8}\.ltmp-tmp", re.DOTALL)
"""Names of what a save has not finished yet."""


LOCK = ".lock"
"""Name of the file that a run holds in its folder."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    A link is followed. What is no regular file (a device, a pipe) is never replaced: it is written into when the block
    ends. What saves in this folder left behind when they were killed is removed.

    >>> with atomic_path("table.json") as temporary:
    ...     temporary.write_text(text)

    Raises:
        LTMPError: the folder cannot be written or the disk is full; `path` is as it was, and no folder was left behind.
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
        # a link to a folder is left to the system: that of a stream may lead to a name that is no folder
        target = Path(os.path.realpath(path)) if path.is_symlink() else path
        with _parents(target), _beside(target, _touch) as temporary:
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            # safetensors puts a file of its own in its place, for this user only
            temporary.chmod(mode)
            temporary.replace(target)
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error


class _TriedError(Exception):
    """Nothing is wrong: ends a save that was only tried."""


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Fail before the work where nothing can be written; no file and no folder is left behind.

    Raises:
        LTMPError: as `atomic_path`.
    """
    path = Path(folder) / "file"
    try:
        with suppress(_TriedError), _parents(path), _beside(path, _touch):
            raise _TriedError
    except OSError as error:
        raise LTMPError(_explain(path.parent, error)) from error


def check_file_writable(path: str | os.PathLike[str]) -> None:
    """Fail before the work where `atomic_path(path)` would; nothing is written.

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
    with suppress(_TriedError), atomic_path(path):
        raise _TriedError


def is_stdout(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is "-", or a name of the file or stream that is printed to."""
    try:
        return os.fspath(path) == "-" or os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError, AttributeError):  # nothing there, or nothing that has a number
        return False


def short_stem(path: Path) -> str:
    """The name without its ending, cut so that a longer ending fits: file systems take 255 bytes."""
    return os.fsdecode(os.fsencode(path.stem)[:200])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder inside: a second run there would undo the first. The lock goes with the process, killed or not.

    Raises:
        LTMPError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    try:
        # neither emptied nor followed: a link there may lead to anything
        file = open(  # noqa: SIM115 - closed below, where it is no longer opening it that can fail
            os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666), "r+b", buffering=0
        )
    except OSError as error:
        raise LTMPError(
            f"cannot lock {folder}: {folder / LOCK} cannot be opened ({error.strerror}): remove it, or choose another "
            "--out"
        ) from error
    with file:
        try:
            # unlike flock, not inherited by the processes that decode, which outlive a killed run by seconds
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise LTMPError(f"another run is writing to {folder}: wait for it, or choose another --out") from error
        yield


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """`path` in a temporary folder beside it, for formats of more than one file: all move over when the block ends.

    The files beside `path` go first, so that it never names one that is not there. Raises like `atomic_path`.
    """
    path = Path(path)
    try:
        with _parents(path), _beside(path, Path.mkdir) as folder:
            yield folder / path.name
            for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):
                file.replace(path.with_name(file.name))
    except OSError as error:
        raise LTMPError(_explain(path, error)) from error


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders that `path` lies in; those that were made go again where the block fails."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            # others may have written there meanwhile
            with suppress(OSError):
                folder.rmdir()
        raise


def _is_special(path: Path) -> bool:
    """Whether there is something that is neither a regular file nor a folder, or that has no name any more."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return False
    named = os.path.exists(os.path.realpath(path))
    return not (named and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)))


@contextmanager
def _beside(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary file or folder beside `path`, removed at the end.

    It is made like any other file, so that the umask has its say, and locked for as long as this process lives: one
    that nobody has locked is left over.
    """
    sweep(path.parent)
    while True:
        # names may have 255 bytes
        temporary = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.ltmp-tmp")
        make(temporary)
        lock = _lock(temporary, wait=True)
        # another process may have swept it before it was locked
        if temporary.exists():
            break
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _touch(path: Path) -> None:
    """Make a file that is not there; a link is not followed."""
    path.touch(exist_ok=False)


def sweep(folder: Path) -> None:
    """Remove what saves that were killed left in a folder; where files cannot be locked, nothing."""
    for entry in os.scandir(folder):
        if _OURS.fullmatch(entry.name) and not entry.is_symlink():
            lock = _lock(Path(entry.path), wait=False)
            if lock is not None:
                _remove(Path(entry.path))
                os.close(lock)


def _lock(path: Path, wait: bool) -> int | None:
    """The handle that holds the lock of a file or folder; None where somebody else does or the system has no locks."""
    handle = None
    try:
        import fcntl

        # a pipe of such a name is not waited for
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        if handle is not None:
            os.close(handle)
        return None
    return handle


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
