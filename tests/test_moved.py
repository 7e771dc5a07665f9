"""What was imported by another name before still is, and says so."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import timm  # noqa: F401 (hosts import it, and its names are registered when it is first imported)

from ltmp._moved import MOVED, MOVED_NAMES

# as the documentation of the last release called them
DOCUMENTED = (
    "ltmp.stack.sizes_of", "ltmp.stack.with_sizes", "ltmp.dial.Dial", "ltmp.dial.keep_on",
    "ltmp.checkpoint.save_weights", "ltmp.checkpoint.plain_state",
)  # fmt: skip


def forget(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for known in [known for known in sys.modules if known == name]:
        monkeypatch.delitem(sys.modules, known)


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_old_modules_import_with_a_warning(old: str, new: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    forget(f"ltmp.{old}", monkeypatch)
    instead = r" or ".join(rf"ltmp\.{name}" for name in new)
    with pytest.warns(DeprecationWarning, match=rf"ltmp\.{old} has moved: import {instead} instead"):
        found = importlib.import_module(f"ltmp.{old}")
    for name in new:
        real = importlib.import_module(f"ltmp.{name}")
        assert real.__name__ == f"ltmp.{name}"
        own = [key for key, value in vars(real).items() if getattr(value, "__module__", None) == real.__name__]
        # torch's compiler leaves functions of its own in modules that it has seen
        public = [key for key in own if not key.startswith("__")]
        assert public
        assert all(getattr(found, key) is getattr(real, key) for key in public)


@pytest.mark.parametrize("documented", DOCUMENTED)
def test_documented_names_are_found_where_they_were(documented: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, name = documented.rpartition(".")
    if module.removeprefix("ltmp.") in MOVED:
        forget(module, monkeypatch)
    with pytest.warns(DeprecationWarning, match="has moved: import"):
        assert getattr(importlib.import_module(module), name) is not None


@pytest.mark.parametrize("module", MOVED_NAMES)
def test_names_that_left_a_module_are_the_very_same(module: str) -> None:
    for name, new in MOVED_NAMES[module].items():
        with pytest.warns(DeprecationWarning, match=rf"ltmp\.{module}\.{name} has moved: import it from ltmp\.{new}"):
            found = getattr(importlib.import_module(f"ltmp.{module}"), name)
        assert found is getattr(importlib.import_module(f"ltmp.{new}"), name)
    with pytest.raises(AttributeError, match=rf"module 'ltmp\.{module}' has no attribute 'nothing'"):
        importlib.import_module(f"ltmp.{module}").nothing  # noqa: B018 (asked for, not used)


def test_checkpoint_alone_imports_nothing_above_it() -> None:
    """Through its own module only: `import ltmp` brings everything."""
    code = (
        "import sys, types; from pathlib import Path; import importlib.util as u;"
        "root = Path(u.find_spec('ltmp').origin).parent; package = types.ModuleType('ltmp');"
        "package.__path__ = [str(root)]; sys.modules['ltmp'] = package; import ltmp.checkpoint;"
        "print([name for name in sys.modules if name.startswith(('ltmp.zoo', 'ltmp.data'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
