"""The tool that runs libraries' own tests: what it attaches, and what it counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import nn

from helpers import tiny_vit
from ltmp.hosts.attach import is_attached

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from host_tests import Attaching, compare


def test_the_outermost_call_attaches_what_it_builds() -> None:
    attaching = Attaching(enabled=True)
    inner = attaching.outermost(tiny_vit, in_place=False)
    outer = attaching.outermost(lambda: [inner(), inner()][0], in_place=False)
    assert is_attached(outer())
    assert attaching.count == 1
    attaching.outermost(lambda: nn.Linear(2, 2), in_place=False)()
    assert attaching.count == 1


def test_plain_runs_count_hosts_and_leave_them_plain() -> None:
    attaching = Attaching(enabled=False)
    assert not is_attached(attaching.outermost(tiny_vit, in_place=False)())
    assert attaching.count == 1


def test_what_fails_on_attached_models_alone_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def test(outcome: str, text: str = "", hosts: int = 1) -> dict[str, object]:
        return {"outcome": outcome, "text": text, "hosts": hosts}

    plain = {name: test("passed") for name in ("good", "fx", "grad", "worse", "none")} | {"bad": test("failed")}
    attached = {
        "good": test("passed"),
        "bad": test("failed"),
        "fx": test("failed", "LTMPError: torch.fx, and what is built on it"),
        "grad": test("failed", "No gradient for ltmp.merge"),
        "worse": test("failed", "another answer"),
        "none": test("failed", "no host", hosts=0),
    }
    assert compare(plain, attached) == ["worse"]
    told = capsys.readouterr().out
    assert "plain    4 passed, 1 failed, 0 skipped\nattached 1 passed, 4 failed, 0 skipped\n" in told
    for line in ("refused tracers: 1", "frozen thresholds: 1", "failed only with attached models: 1"):
        assert line in told.splitlines()
    assert "another answer" in told
