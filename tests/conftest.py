"""Before anything imports Triton: without a CUDA device its kernels run in the interpreter."""

import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the registry of hosts, which tests of other folders read, too
sys.path.insert(0, str(Path(__file__).parent / "hosts"))


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """`ltmp serve` logs to its own handler alone; the next test reads the log as ever."""
    logger = logging.getLogger("ltmp")
    before = (logger.handlers[:], logger.propagate, logger.level)
    yield
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])
