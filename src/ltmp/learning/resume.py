"""A learning run on disk, so that a killed one goes on and ends where it would have."""

from __future__ import annotations

import io
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import LTMPError
from ..files import atomic_path


def save_run(path: str | Path, settings: dict[str, Any], state: dict[str, Any]) -> None:
    """Write a run's settings and state; plain tensors and numbers only."""
    # through memory: writing a file itself, torch reports a full disk as "unexpected pos 768 vs 662"
    buffer = io.BytesIO()
    torch.save({"format": "ltmp-run", "settings": settings, "state": state}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_run(path: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The state saved at `path`, or None where there is none.

    Raises:
        LTMPError: truncated, not a run, or a run with other settings; the message names them.
    """
    if not Path(path).exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        ours = saved["format"] == "ltmp-run"
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, IndexError) as error:
        raise LTMPError(f"{path} is truncated or not a learning run: delete it to start over") from error
    if not ours:
        raise LTMPError(f"{path} is not a learning run: choose another checkpoint file")
    other = [
        f"{k} {saved['settings'].get(k)!r}, now {v!r}" for k, v in settings.items() if saved["settings"].get(k) != v
    ]
    if other:
        raise LTMPError(f"{path} is of a run with other settings ({'; '.join(other)}): repeat those, or delete it")
    return dict(saved["state"])


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that come inside are heeded at the end, so that what is saved then is no half of a step."""
    if threading.current_thread() is not threading.main_thread():
        # signals reach the main thread alone
        yield
        return
    came: list[int] = []
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    # a handler of another language cannot be put back
    ours = [one for one, handler in before.items() if handler is not None]
    for one in ours:
        signal.signal(one, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for one in ours:
            signal.signal(one, before[one])
    for number in came:
        signal.raise_signal(number)
