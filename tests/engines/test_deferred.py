"""Deferred tensors behave like the tensors they stand for, however they are read."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ltmp.engines.deferred import defer, read

VALUES = torch.arange(6.0).view(1, 2, 3)


class CountingEngine:
    """Returns `VALUES` and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return VALUES.clone()


def test_nothing_is_computed_until_it_is_read_and_then_once() -> None:
    compute = CountingEngine()
    x: Any = defer(compute, VALUES)
    x.mark = "here"
    assert isinstance(x, Tensor)
    assert (x.shape, x.dtype, x.device, x.ndim, len(x), x.size(-1)) == (
        VALUES.shape,
        VALUES.dtype,
        VALUES.device,
        3,
        1,
        3,
    )
    assert compute.calls == 0
    assert torch.equal(x + 1, VALUES + 1)
    assert torch.equal(x * 2, VALUES * 2)
    assert compute.calls == 1
    assert read(x) is read(x)
    assert read(x).mark == "here"
    assert read(VALUES) is VALUES


READERS: dict[str, Any] = {
    "module": nn.LayerNorm(3), "index": lambda x: x[:, 1:], "list": lambda x: torch.cat([x, x]),
    "keyword": lambda x: torch.add(input=x, other=1), "out": lambda x: torch.empty(1, 2, 3).copy_(x),
    "method": lambda x: x.mean(-1), "operator": lambda x: torch.ops.aten.mul(x, 2),
    "numpy": lambda x: torch.from_numpy(np.asarray(x) + 1), "lists": lambda x: torch.tensor(x.tolist()),
    "deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "text": lambda x: torch.tensor(len(repr(x))),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_reader_gets_plain_values(reader: str, mode: Any) -> None:
    with mode():
        result = READERS[reader](defer(CountingEngine(), VALUES))
        assert type(result) is Tensor
        assert torch.equal(result, READERS[reader](VALUES))


@torch.no_grad()
def test_in_place_operations_persist() -> None:
    x = y = defer(CountingEngine(), VALUES)
    y += 1
    assert type(y) is Tensor
    assert torch.equal(x + 0, VALUES + 1)
