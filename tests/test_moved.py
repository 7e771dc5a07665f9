"""What was imported by another name before still is, and says so."""

from __future__ import annotations

import importlib
import sys

import pytest

from ltmp._moved import MOVED


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_modules_import_with_a_warning(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == f"ltmp.{old}"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.warns(DeprecationWarning, match=rf"ltmp\.{old} has moved: import ltmp\.{new} instead"):
        found = importlib.import_module(f"ltmp.{old}")
    real = importlib.import_module(f"ltmp.{new}")
    assert real.__name__ == f"ltmp.{new}"
    public = [name for name, value in vars(real).items() if getattr(value, "__module__", None) == real.__name__]
    assert public
    assert all(getattr(found, name) is getattr(real, name) for name in public)
