"""CPU kernels: compiled by numba when first called, and cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@cache
def unavailable() -> str | None:
    """Why CPU kernels cannot be compiled, as the end of a sentence, or None if they can. Imports numba."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", None) == "numba":
            return "needs numba, which is not installed (pip install 'ltmp[cpu]')"
        # numba refuses versions of NumPy that it does not support
        return f"needs numba, which does not load here ({str(error).splitlines()[0]})"
    return None


def compiled(function: F) -> F:
    """Compile when first called, without the GIL and with exact float32 arithmetic; cache the result on disk.

    numba picks the folder: next to the source, or the user's cache (`NUMBA_CACHE_DIR` sets another). If neither is
    writable, every process compiles again.

    numba invalidates the cache when the kernel's own file changes, and for no other, so kernels only call kernels of
    the same file.
    """
    try:
        return _njit(function, nogil=True, cache=True)
    except RuntimeError:  # no folder for the cache
        return _njit(function, nogil=True)


def inlined(function: F) -> F:
    """Compile as part of its callers: for helpers of the kernels in the same file."""
    return _njit(function, no_cpython_wrapper=True)


def _njit(function: F, **options: Any) -> F:
    import numba

    # numba's type hints lack some options
    njit: Any = numba.njit
    return njit(function, error_model="numpy", no_cfunc_wrapper=True, **options)
