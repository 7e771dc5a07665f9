"""Whether kernels for the CPU can be compiled here, and how they are: by numba, when first called, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@cache
def unavailable() -> str | None:
    """Why the compiled kernels cannot run, as the end of a sentence, or None. Imports numba."""
    try:
        import numba  # noqa: F401
    except ImportError as error:
        if getattr(error, "name", None) == "numba":
            return "needs numba, which is not installed (pip install 'ltmp[cpu]')"
        # numba refuses versions of NumPy that it does not know
        return f"needs numba, which does not load here ({str(error).splitlines()[0]})"
    return None


def compiled(function: F) -> F:
    """Compile when first called, without the GIL and with exact float32 arithmetic; keep the result on disk.

    numba picks the folder: next to the source, or else the user's cache (`NUMBA_CACHE_DIR` names another). Where
    neither can be written to, every process compiles anew.

    numba notices changes of a kernel's own file only, so kernels call none in other files.
    """
    try:
        return _njit(function, nogil=True, cache=True)
    except RuntimeError:  # no folder for the cache
        return _njit(function, nogil=True)


def inlined(function: F) -> F:
    """For what only kernels of the same file call: compiled as part of them."""
    return _njit(function, no_cpython_wrapper=True)


def _njit(function: F, **options: Any) -> F:
    import numba

    # its types lack some options
    njit: Any = numba.njit
    return njit(function, error_model="numpy", no_cfunc_wrapper=True, **options)
