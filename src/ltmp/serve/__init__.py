"""Serve a reduced model over HTTP, with dynamic batching and limits on everything that a client controls.

>>> from ltmp.serve import Deployment, Limits, create_app, run
>>> run(create_app(Deployment(model), Limits(max_queue=64)), port=8000)

`create_app` and `run` need the extra `serve`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..data import read_names as read_names
from ..deploy import Deployment as Deployment
from ..errors import MissingExtraError
from .limits import Limits as Limits

if TYPE_CHECKING:
    from .endpoints import create_app as create_app
    from .server import bind as bind
    from .server import log_to_stderr as log_to_stderr
    from .server import run as run

_LAZY = {"create_app": "endpoints", "bind": "server", "log_to_stderr": "server", "run": "server"}


def __getattr__(name: str) -> Any:
    """Import FastAPI and uvicorn only for the names that need them, not on `import ltmp.serve`."""
    if name == "Predictor":
        import warnings

        warnings.warn("ltmp.serve.Predictor is now ltmp.serve.Deployment", DeprecationWarning, stacklevel=2)
        return Deployment
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve", "The HTTP service") from error
