"""The command line, one verb per job. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted."""

from __future__ import annotations

import _thread
import errno
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import INTERRUPTED, LTMPError, MissingExtraError, UsageError
from ..sanitize import printable

DISTRIBUTED_VERBS = ("learn", "eval")
"""The verbs that torchrun may start; with any other, all ranks would write the same files."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""`atomic_path` reports these for files, with their name; without a name it is stdout that cannot be written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ltmp` and return its exit code; an error is printed as one sentence, with a traceback only under --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    before = sys.unraisablehook
    sys.unraisablehook = hook = partial(_interrupt_or_report, before)
    try:
        return _run_reporting_errors(arguments)
    finally:
        if sys.unraisablehook is hook:
            sys.unraisablehook = before


def _run_reporting_errors(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
        # a failing write must raise here, and not when the interpreter exits
        sys.stdout.flush()
        return code
    except LTMPError as error:
        return _fail(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _has_reader(sys.stdout):
            # the reader of our output, such as `head`, has closed it
            _discard(sys.stdout)
            return 1
        if isinstance(error, OSError) and not error.filename and error.errno in _DISK_FULL:
            _discard(sys.stdout)
            return _fail(f"cannot write the results: {error.strerror}; send them elsewhere", 1, arguments)
        if isinstance(error, OSError) and error.filename and error.strerror:
            return _fail(f"cannot use {error.filename}: {error.strerror}; choose another path", 1, arguments)
        return _fail(f"{type(error).__name__}: {error} (add --debug for the traceback)", 1, arguments)


def _run(arguments: list[str]) -> int:
    if _under_torchrun() and arguments and arguments[0] not in DISTRIBUTED_VERBS:
        raise UsageError(f"`{arguments[0]}` runs in one process: start it without torchrun")
    try:
        # imported here only to check for it: an ImportError of anything else below is not a missing extra
        import typer  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("typer", "cli", "The command line") from error
    from .commands import call

    try:
        return call(arguments)
    except Exception as error:
        # Typer's own usage errors; their class moved from click into typer, so it is recognised by a method
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message() or "no verb given"
        return _fail(f"{message} (ltmp --help and ltmp VERB --help explain)", 2, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> int:
    """Print an error and return its exit code."""
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
    elif code == INTERRUPTED:
        # objects that Ctrl-C left half built print tracebacks when they are finalised, until the process ends
        sys.unraisablehook = _ignore
    print(f"error{_rank_label()}: {printable(message)}", file=sys.stderr)
    return code


def _rank_label() -> str:
    """The rank of this process under torchrun: any of them may fail, and torchrun then ends the others."""
    return f" (rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if _under_torchrun() else ""


def _under_torchrun() -> bool:
    """Whether torchrun started this process. Imports torch, which takes seconds, only if RANK is set."""
    if "RANK" not in os.environ:
        return False
    from ..distributed import started

    return started()


def _has_reader(stream: Any) -> bool:
    """Whether the other end of `stream` is still open; if it is, the broken pipe is another one."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no `poll` on Windows, or no file descriptor
        return True


def _discard(stream: Any) -> None:
    """Send what is still buffered to the null device, so that flushing it at exit does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _interrupt_or_report(report: Callable[[Any], Any], unraisable: Any) -> None:
    """A hook for exceptions in finalisers, where Python would drop a Ctrl-C: raise it in the main thread instead."""
    if isinstance(unraisable.exc_value, KeyboardInterrupt):
        leaving = threading.Event()
        threading.Thread(target=_interrupt_after, args=(leaving,), daemon=True).start()
        leaving.set()
    else:
        report(unraisable)


def _interrupt_after(leaving: threading.Event) -> None:
    """Interrupt the main thread once it has left the hook, in which the interrupt would be dropped again."""
    leaving.wait()
    time.sleep(0.01)
    _thread.interrupt_main()


def _ignore(unraisable: Any) -> None:
    pass
