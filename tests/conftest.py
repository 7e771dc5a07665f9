"""Before anything imports Triton: without a CUDA device its kernels run in the interpreter."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the registry of hosts, which tests of other folders read, too
sys.path.insert(0, str(Path(__file__).parent / "hosts"))
