"""Settings of a call that travel beside its arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


@contextmanager
def held(variable: ContextVar[Any], value: T) -> Iterator[T]:
    """Give a variable a value inside, in this thread only."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)
