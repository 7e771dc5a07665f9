#!/usr/bin/env python3
"""Run a host library's own tests on plain and on attached models (thresholds off), and list what only fails attached.

Every model that a test builds is attached before the test gets it. Tests that build no supported host are not counted.
Tests are in the libraries' source distributions, not in their wheels:

    pip download --no-deps --no-binary timm timm && tar xf timm-*.tar.gz
    python tools/host_tests.py timm-*/tests/test_models.py -k 'vit_tiny or deit_tiny'

The source distribution of transformers has the tests that all models share, but not the modules that run them;
`transformers_tests.py` beside this file replaces these modules for the supported hosts.

    python tools/host_tests.py --transformers transformers-*/

Unknown options are passed to pytest. The exit code is 1 if a test fails with attached models but not with plain ones.
Three kinds of expected failures are counted separately: tracers (torch.fx, TorchScript) are refused; tests that require
a gradient of every parameter find none for the thresholds, which are frozen; and the state dict of an attached model
has thresholds, which are unexpected keys for a factory that loads it strictly before anything is attached.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ltmp

REPORT, MODE = "LTMP_HOST_TESTS", "LTMP_HOST_TESTS_MODE"
"""Environment variables that pass the report's path, and whether to attach, from the command line to the plugin."""

FACTORIES = {
    "timm": (("timm", "timm.models", "timm.models._factory"), "create_model"),
    "open_clip": (("open_clip", "open_clip.factory", "open_clip_train.main"), "create_model"),
}
"""From library to the modules that expose its factory function, and the name of that function."""

EXPECTED = {
    "refused tracers": ("torch.jit", "torch.fx", "create_feature_extractor"),
    "thresholds in the state dict of a model that is built plain": ('Unexpected key(s) in state_dict: "ltmp.',),
    "frozen thresholds": ("No gradient for ltmp.", "Some parameters are missing gradients", "ltmp.merge in "),
}
"""Kinds of expected failures, and parts of their messages."""


class Attaching:
    """Attaches models as tests build them: after the outermost factory or constructor call, hosts inside included."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.depth, self.count = enabled, 0, 0

    def outermost(self, build: Callable[..., Any], *, in_place: bool) -> Callable[..., Any]:
        """Wrap `build` to attach its result or, for an `__init__` (`in_place`), its first argument."""

        @functools.wraps(build)
        def built(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                result = build(*args, **kwargs)
            finally:
                self.depth -= 1
            if self.depth == 0:
                self.attach(args[0] if in_place else result)
            return result

        return built

    def attach(self, model: Any) -> None:
        """Attach a model with a supported host inside. Such models are counted in plain runs, too."""
        if not isinstance(model, nn.Module):
            return
        try:
            ltmp.attach(model)
        except ltmp.LTMPError:
            return
        self.count += 1
        if not self.enabled:
            ltmp.detach(model)

    def install(self) -> None:
        """Patch the factories and constructors of the installed libraries."""
        for library, (modules, name) in FACTORIES.items():
            for module in map(_imported, modules):
                if module is not None and hasattr(module, name):
                    setattr(module, name, self.outermost(getattr(module, name), in_place=False))
            for kind in _hosts(library):
                kind.__init__ = self.outermost(kind.__init__, in_place=True)  # type: ignore[method-assign]
        for kind in _pretrained():
            kind.__init__ = self.outermost(kind.__init__, in_place=True)
        transformers = _imported("transformers")
        if transformers is not None:
            loader = transformers.PreTrainedModel.from_pretrained.__func__
            transformers.PreTrainedModel.from_pretrained = classmethod(self.outermost(loader, in_place=False))


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _hosts(library: str) -> Iterator[type[nn.Module]]:
    from ltmp.hosts.attach import recipes

    if _imported(library) is not None:
        # recipes by name only are for newer versions of a library, or for subclasses of these hosts
        yield from (kind for kind in recipes(library) if isinstance(kind, type))


def _pretrained() -> Iterator[Any]:
    """Every model class of transformers in a module that defines a supported host."""
    transformers = _imported("transformers")
    modules = {sys.modules[kind.__module__] for kind in _hosts("transformers")}
    for module in sorted(modules, key=lambda module: module.__name__):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and "__init__" in vars(kind):
                yield kind


class Plugin:
    """Records the outcome of every test, and how many hosts it built."""

    def __init__(self, attaching: Attaching) -> None:
        self.attaching, self.outcomes = attaching, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if call.when == "call" or not report.passed:
            outcome, text = report.outcome, str(report.longrepr or "")
            self.outcomes[item.nodeid] = {"outcome": outcome, "hosts": self.attaching.count, "text": text[-4000:]}
        return report

    def pytest_runtest_setup(self) -> None:
        self.attaching.count = self.attaching.depth = 0

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[REPORT]).write_text(json.dumps(self.outcomes))


def pytest_configure(config: pytest.Config) -> None:
    """Hook of pytest, which loads this file as a plugin, in a separate process for each mode."""
    if REPORT not in os.environ:
        return
    attaching = Attaching(os.environ[MODE] == "attached")
    attaching.install()
    config.pluginmanager.register(Plugin(attaching), "ltmp-host-tests")


def run(mode: str, arguments: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Run pytest with plain or attached models; returns the outcome of every test."""
    report = folder / f"{mode}.json"
    here = str(Path(__file__).parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        REPORT: str(report),
        MODE: mode,
    }
    command = [sys.executable, "-m", "pytest", "-p", "host_tests", "-p", "no:cacheprovider", "-q", "--tb=short"]
    done = subprocess.run([*command, *arguments], env=environment, check=False)
    if not report.exists():
        raise SystemExit(f"pytest ended with {done.returncode} and ran no test")
    outcomes: dict[str, dict[str, Any]] = json.loads(report.read_text())
    return outcomes


def compare(plain: dict[str, dict[str, Any]], attached: dict[str, dict[str, Any]]) -> list[str]:
    """Print counts, and the tests that fail only with attached models; returns those that are not expected to."""
    counted = [name for name, test in attached.items() if test["hosts"] and name in plain]
    for mode, outcomes in (("plain", plain), ("attached", attached)):
        counts = Counter(outcomes[name]["outcome"] for name in counted)
        print(f"{mode:9}" + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    worse = [n for n in counted if attached[n]["outcome"] == "failed" and plain[n]["outcome"] != "failed"]
    left = list(worse)
    for kind, parts in EXPECTED.items():
        expected = [name for name in left if any(part in attached[name]["text"] for part in parts)]
        left = [name for name in left if name not in expected]
        print(f"{kind}: {len(expected)}")
    print(f"failed only with attached models: {len(left)}")
    for name in left:
        print(f"\n{name}\n{attached[name]['text']}")
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", type=Path, metavar="FOLDER", help="its unpacked source distribution")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.transformers:
            os.environ["LTMP_HOST_TESTS_TRANSFORMERS"] = str(options.transformers.resolve())
            module = Path(__file__).with_name("transformers_tests.py")
            # ignore the pytest settings of this repository
            arguments = ["-c", os.devnull, f"--rootdir={module.parent}", str(module), *arguments]
        return bool(compare(*(run(mode, arguments, folder) for mode in ("plain", "attached"))))


if __name__ == "__main__":
    sys.exit(main())
