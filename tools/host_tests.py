#!/usr/bin/env python3
"""A host library's own tests, on its plain models and on attached ones with thresholds off: what fails on these alone?

Every model that a test builds is attached as soon as the test gets it; tests that build no known host are not counted.
The libraries' wheels hold no tests, their source distributions do:

    pip download --no-deps --no-binary timm timm && tar xf timm-*.tar.gz
    python tools/host_tests.py timm-*/tests/test_models.py -k 'vit_tiny or deit_tiny'

transformers' distribution holds the tests that all of its models share, and not the modules that run them:
`transformers_tests.py` beside this file stands in for those of the hosts.

    python tools/host_tests.py --transformers transformers-*/

Everything unknown goes to pytest. The exit code is 1 where attached models fail where plain ones do not. Three kinds
are counted apart: tracers (torch.fx, TorchScript) are refused; tests that ask every parameter for a gradient find none
at the thresholds, which are frozen; and the state dict of an attached model holds thresholds, which a factory finds
unexpected that loads it strictly before anything is attached.
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
"""Environment variables by which the command line tells the plugin where its report goes, and whether to attach."""

FACTORIES = {
    "timm": (("timm", "timm.models", "timm.models._factory"), "create_model"),
    "open_clip": (("open_clip", "open_clip.factory", "open_clip_train.main"), "create_model"),
}
"""Library to the modules that hold the function that builds its models."""

APART = {
    "refused tracers": ("torch.jit", "torch.fx", "create_feature_extractor"),
    "thresholds in the state dict of a model that is built plain": ('Unexpected key(s) in state_dict: "ltmp.',),
    "frozen thresholds": ("No gradient for ltmp.", "Some parameters are missing gradients", "ltmp.merge in "),
}
"""Kinds of failures that are meant, and what their messages hold."""


class Attaching:
    """Attaches what a test builds: the outermost call of a factory or of a host's class; hosts inside come with it."""

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.depth, self.count = enabled, 0, 0

    def outermost(self, build: Callable[..., Any], *, in_place: bool) -> Callable[..., Any]:
        """`build`, whose result (or first argument, of an `__init__`) is attached."""

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
        """Attach, where there is a known host inside; the number of those is counted in plain runs, too."""
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
        """Stand in for the factories and the constructors of the libraries that are installed."""
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
        # those known by name alone are of libraries' newer versions, or subclasses of these
        yield from (kind for kind in recipes(library) if isinstance(kind, type))


def _pretrained() -> Iterator[Any]:
    """Every model of transformers in a module that defines a host."""
    transformers = _imported("transformers")
    modules = {sys.modules[kind.__module__] for kind in _hosts("transformers")}
    for module in sorted(modules, key=lambda module: module.__name__):
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and "__init__" in vars(kind):
                yield kind


class Plugin:
    """Notes the outcome of every test, and whether it built a host."""

    def __init__(self, attaching: Attaching) -> None:
        self.attaching, self.found = attaching, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if call.when == "call" or not report.passed:
            outcome, text = report.outcome, str(report.longrepr or "")
            self.found[item.nodeid] = {"outcome": outcome, "hosts": self.attaching.count, "text": text[-4000:]}
        return report

    def pytest_runtest_setup(self) -> None:
        self.attaching.count = self.attaching.depth = 0

    def pytest_sessionfinish(self) -> None:
        Path(os.environ[REPORT]).write_text(json.dumps(self.found))


def pytest_configure(config: pytest.Config) -> None:
    """pytest loads this file as a plugin, in a process of its own for each mode."""
    if REPORT not in os.environ:
        return
    attaching = Attaching(os.environ[MODE] == "attached")
    attaching.install()
    config.pluginmanager.register(Plugin(attaching), "ltmp-host-tests")


def run(mode: str, arguments: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """The outcome of every test with plain or with attached models."""
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
    found: dict[str, dict[str, Any]] = json.loads(report.read_text())
    return found


def compare(plain: dict[str, dict[str, Any]], attached: dict[str, dict[str, Any]]) -> list[str]:
    """Print the counts; the tests that fail on attached models alone, what is meant apart."""
    counted = [name for name, test in attached.items() if test["hosts"] and name in plain]
    for mode, found in (("plain", plain), ("attached", attached)):
        counts = Counter(found[name]["outcome"] for name in counted)
        print(f"{mode:9}" + ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped")))
    worse = [n for n in counted if attached[n]["outcome"] == "failed" and plain[n]["outcome"] != "failed"]
    left = list(worse)
    for kind, parts in APART.items():
        meant = [name for name in left if any(part in attached[name]["text"] for part in parts)]
        left = [name for name in left if name not in meant]
        print(f"{kind}: {len(meant)}")
    print(f"failed on attached models alone: {len(left)}")
    for name in left:
        print(f"\n{name}\n{attached[name]['text']}")
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers", type=Path, metavar="FOLDER", help="its source distribution, unpacked")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if options.transformers:
            os.environ["LTMP_HOST_TESTS_TRANSFORMERS"] = str(options.transformers.resolve())
            module = Path(__file__).with_name("transformers_tests.py")
            # not by the settings of this repository
            arguments = ["-c", os.devnull, f"--rootdir={module.parent}", str(module), *arguments]
        return bool(compare(*(run(mode, arguments, folder) for mode in ("plain", "attached"))))


if __name__ == "__main__":
    sys.exit(main())
