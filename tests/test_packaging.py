"""The package imports lightly, every module without extras, and its metadata agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ltmp

ROOT = Path(__file__).parents[1]
HEAVY = ("timm", "torchvision", "transformers", "triton", "typer", "rich", "matplotlib", "mlxtend")
EXTRAS = (
    "typer", "rich", "matplotlib", "mlxtend", "sklearn", "pandas", "transformers", "open_clip", "onnx", "onnxscript",
    "onnxruntime", "openvino", "pyarrow", "ray", "fastapi", "uvicorn", "prometheus_client", "gradio", "imageio_ffmpeg",
    "tensorboard", "wandb", "peft",
)  # fmt: skip
MODULES = sorted(module.name for module in pkgutil.walk_packages(ltmp.__path__, "ltmp."))
# these are the command line and the kernels: they are imported by what needs them, and say what is missing
NEED_EXTRAS = re.compile(
    r"ltmp\.cli\..+|ltmp\..*triton|ltmp\.hosts\.(transformers|open_clip)|ltmp\.serve\.(endpoints|metrics|bodies|server)"
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light_and_touches_no_gpu():
    # torch itself brings triton in where it is installed
    before = run(f"import sys, torch; print([m for m in {HEAVY} if m in sys.modules])")
    after = run(
        f"import sys, ltmp, torch; assert not torch.cuda.is_initialized();"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    assert after == before


def test_modules_import_without_extras():
    wanted = [name for name in MODULES if not NEED_EXTRAS.fullmatch(name)]
    assert len(wanted) > 20
    run(
        f"import importlib, sys; sys.modules.update(dict.fromkeys({EXTRAS}));"
        f"[importlib.import_module(name) for name in {wanted}]"
    )


def test_public_names_exist():
    public = [name for name in dir(ltmp) if not name.startswith("_")]
    assert {"attach", "detach", "learn", "save", "load", "record", "dense", "LTMPConfig", "LTMPError"} <= set(public)
    assert all(getattr(ltmp, name) is not None for name in public)


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("ltmp") == ltmp.__version__
    assert f"version: {ltmp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# A layer may import from itself and from those to its right (docs/contributing.md).
LAYERS = (
    ("cli", "__main__"),
    ("app",),
    ("demo",),
    ("hub", "export", "serve", "report"),
    ("learning", "evaluate", "predict"),
    ("deploy", "visualize", "distributed"),
    ("data",),
    ("zoo",),
    ("checkpoint",),
    ("hosts",),
    ("engines",),
    ("calls",),
    ("method",),
    ("ops", "config"),
    ("files", "locate", "errors", "_version", "_moved"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """What a file imports directly under `ltmp`, types left out."""
    package = path.relative_to(ROOT / "src" / "ltmp").parts[:-1]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) - node.level + 1], *(node.module.split(".") if node.module else [])]
            found |= {base[0]} if base else {alias.name for alias in node.names}
    return found & RANK.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "ltmp").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "src" / "ltmp").with_suffix("").parts[0]
    if own == "__init__":
        return
    assert own in RANK, f"give {own} a layer"
    assert {other for other in imports(path) if RANK[other] < RANK[own]} == set()


def test_imports_are_found():
    package = ROOT / "src" / "ltmp"
    assert imports(package / "demo.py") >= {"data", "evaluate", "files", "visualize"}
    assert imports(package / "cli" / "commands.py") >= {"cli", "evaluate", "checkpoint"}
    assert imports(package / "hosts" / "attach.py") >= {"config", "engines", "method"}
