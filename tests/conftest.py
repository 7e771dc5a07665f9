"""Before anything imports Triton: without a CUDA device its kernels run in the interpreter."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

# how long an example takes says more of the machine than of the package
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the registry of hosts, which tests of other folders read, too
sys.path.insert(0, str(Path(__file__).parent / "hosts"))


def prepare_once() -> None:
    """Triton's interpreter prepares its language anew for each function that a kernel calls, for a third of its time.

    Here a kernel and all that it calls prepare each module of the language once, and clean up when the kernel is done.
    """
    try:
        from triton import language
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare, prepared = interpreter._patch_lang, {}

    class Scope:
        def restore(self) -> None:
            for scope in reversed(prepared.values()):
                scope.restore()
            prepared.clear()

    def prepare_language(function: Any) -> Scope:
        values = function.__globals__.values()
        modules = tuple(module for module in (language, language.core) if any(value is module for value in values))
        if modules not in prepared:
            prepared[modules] = prepare(function)
        return Scope()

    interpreter._patch_lang = prepare_language


if os.environ.get("TRITON_INTERPRET") == "1":
    prepare_once()


@pytest.fixture(autouse=True)
def reduction_always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are faster dense, and tests are of reduced answers, however often they ask for them."""
    monkeypatch.setattr("ltmp.engines.trial.MARGIN", float("inf"))


@pytest.fixture(autouse=True)
def own_complaints(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C the command line says nothing more to the end of the process, which in tests goes on."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """Each test reads the log as ever: `ltmp serve`, which a fixture may run, configures it, and libraries do."""
    logging.disable(logging.NOTSET)
    for name in [name for name in logging.Logger.manager.loggerDict if name.split(".")[0] == "ltmp"]:
        logging.getLogger(name).disabled = False
    logger = logging.getLogger("ltmp")
    before = (logger.handlers[:], logger.propagate, logger.level)
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])
