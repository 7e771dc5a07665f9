"""Reading the logits from the output of a classifier."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import ltmp
from ltmp.hosts.outputs import logits_of


def test_logits_of() -> None:
    logits = torch.zeros(2, 3)
    assert logits_of(logits) is logits
    assert logits_of(SimpleNamespace(logits=logits)) is logits
    for without in (SimpleNamespace(), SimpleNamespace(logits=None), (logits,)):
        with pytest.raises(ltmp.LTMPError, match="without logits"):
            logits_of(without)
