"""Learning does not change the caller's global random state."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the global generators of Python, NumPy and torch (CPU and CUDA) on exit, even after an error.

    Also works as a decorator. Loaders of other libraries, their transforms and new weights draw from these generators,
    and a run seeds torch's so that it can be resumed.
    """
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    initialized = torch.cuda.is_initialized()
    cuda = torch.cuda.get_rng_state_all() if initialized else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if initialized:
            torch.cuda.set_rng_state_all(cuda)
        elif torch.cuda.is_available():
            # the seed with which CUDA would have been initialised
            torch.cuda.manual_seed_all(torch.initial_seed())
