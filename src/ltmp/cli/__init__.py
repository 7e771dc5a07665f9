"""The command line: one verb a job. Exit codes: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""

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

ON_SEVERAL_RANKS = ("learn", "eval")
"""The verbs that torchrun may start; others would all write the same files."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""There is no room. Of files `atomic_path` says it, with their names: what is left is what is printed to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ltmp`; what can go wrong is told in one sentence, with a traceback only under --debug."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    before = sys.unraisablehook
    sys.unraisablehook = ours = partial(_tell_or_interrupt, before)
    try:
        return _guarded(arguments)
    finally:
        if sys.unraisablehook is ours:
            sys.unraisablehook = before


def _guarded(arguments: list[str]) -> int:
    try:
        code = _run(arguments)
        # what cannot be written is told now, and not by the interpreter at its end
        sys.stdout.flush()
        return code
    except LTMPError as error:
        return _fail(str(error), error.exit_code, arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, arguments)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
            # whoever read our output has seen enough
            _discard(sys.stdout)
            return 1
        if isinstance(error, OSError) and not error.filename and error.errno in _FULL:
            _discard(sys.stdout)
            return _fail(f"cannot write the results: {error.strerror}; send them elsewhere", 1, arguments)
        if isinstance(error, OSError) and error.filename and error.strerror:
            return _fail(f"cannot use {error.filename}: {error.strerror}; choose another path", 1, arguments)
        return _fail(f"{type(error).__name__}: {error} (add --debug for the traceback)", 1, arguments)


def _is_read(stream: Any) -> bool:
    """Whether somebody reads what is written there; other pipes may break, too."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError):  # no such call on Windows, or no file
        return True


def _discard(stream: Any) -> None:
    """What waits to be written there must not fail once more at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _tell_or_interrupt(tell: Callable[[Any], Any], told: Any) -> None:
    """Python forgets a Ctrl-C that comes while something is thrown away: here it counts."""
    if isinstance(told.exc_value, KeyboardInterrupt):
        left = threading.Event()
        threading.Thread(target=_interrupt_after, args=(left,), daemon=True).start()
        left.set()
    else:
        tell(told)


def _interrupt_after(left: threading.Event) -> None:
    """Interrupt the main thread when it has left the hook, which nobody could interrupt either."""
    left.wait()
    time.sleep(0.01)
    _thread.interrupt_main()


def _tell_nothing(told: Any) -> None:
    pass


def _run(arguments: list[str]) -> int:
    if _started() and arguments and arguments[0] not in ON_SEVERAL_RANKS:
        raise UsageError(f"`{arguments[0]}` runs in one process: start it without torchrun")
    try:
        # all that follows needs it; what else fails to import there is no missing extra
        import typer  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("typer", "cli", "The command line") from error
    from .commands import call

    try:
        return call(arguments)
    except Exception as error:
        # Typer's own complaints about options; their class moved from click into typer
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message() or "no verb given"
        return _fail(f"{message} (ltmp --help and ltmp VERB --help explain)", 2, arguments)


def _fail(message: str, code: int, arguments: list[str]) -> int:
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
    elif code == INTERRUPTED:
        # what Ctrl-C left half built complains by tracebacks when it is thrown away, up to the end of the process
        sys.unraisablehook = _tell_nothing
    print(f"error{_whose()}: {printable(message)}", file=sys.stderr)
    return code


def _whose() -> str:
    """Which of the processes that torchrun started this is: any of them may fail, and torchrun ends the others."""
    return f" (rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']})" if _started() else ""


def _started() -> bool:
    """Whether torchrun started this process; asks torch only where that is possible, as importing it takes seconds."""
    if "RANK" not in os.environ:
        return False
    from ..distributed import started

    return started()
