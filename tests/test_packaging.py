"""The package imports lightly, every module without extras, and its metadata agree."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import ltmp

ROOT = Path(__file__).parents[1]
HEAVY = ("timm", "torchvision", "transformers", "triton", "numba", "typer", "rich", "matplotlib", "mlxtend")
EXTRAS = (
    "typer", "rich", "matplotlib", "mlxtend", "sklearn", "pandas", "transformers", "open_clip", "onnx", "onnxscript",
    "onnxruntime", "openvino", "pyarrow", "ray", "fastapi", "uvicorn", "prometheus_client", "gradio", "imageio_ffmpeg",
    "tensorboard", "wandb", "peft", "numba", "lightning",
)  # fmt: skip
MODULES = sorted(module.name for module in pkgutil.walk_packages(ltmp.__path__, "ltmp."))
# these are the command line and the kernels: they are imported by what needs them, and say what is missing
NEED_EXTRAS = re.compile(
    r"ltmp\.cli\..+|ltmp\.callbacks\.(transformers|lightning)|ltmp\..*(triton|numba)"
    r"|ltmp\.hosts\.(transformers|towers|open_clip)"
    r"|ltmp\.serve\.(endpoints|metrics|bodies|server|protocol)"
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


def test_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "src" / "ltmp" / "__init__.py").read_text())
    (block,) = (node.body for node in tree.body if isinstance(node, ast.If))
    assert {alias.asname: node.module for node in block for alias in node.names} == ltmp._HOMES
    assert ltmp._HOMES.keys() <= set(dir(ltmp))


def test_nothing_heavy_is_imported_before_it_is_used():
    assert run("import ltmp, sys; dir(ltmp); print({'torch', 'numpy', 'PIL', 'timm'} & sys.modules.keys())") == "set()"
    assert run("import ltmp; print(ltmp.evaluate.__name__, ltmp.LTMPConfig().tau, hasattr(ltmp, 'nothing'))") == (
        "ltmp.evaluate 0.1 False"
    )


def test_version_is_the_same_everywhere():
    assert importlib.metadata.version("ltmp") == ltmp.__version__
    assert f"version: {ltmp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


# A package may import from the layers to its right, never from a neighbour in its own (docs/contributing.md).
LAYERS = (
    ("__main__",),
    ("cli",),
    ("app",),
    ("demo",),
    ("hub", "export", "serve", "report"),
    ("certification",),
    ("evaluate", "predict"),
    ("learning",),
    ("bundle", "callbacks", "state", "visualize"),
    ("deploy", "distributed"),
    ("data",),
    ("zoo",),
    ("checkpoint",),
    ("hosts",),
    ("engines",),
    ("calls",),
    ("method",),
    ("ops", "config"),
    ("files", "locate", "ranges", "fingerprint"),
    ("errors", "sanitize", "_version", "_moved"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    """What a file imports directly under `ltmp`, for types and inside functions, too."""
    package = path.relative_to(ROOT / "src" / "ltmp").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
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
    assert {other for other in imports(path) - {own} if RANK[other] <= RANK[own]} == set()


def test_imports_are_found():
    package = ROOT / "src" / "ltmp"
    assert imports(package / "demo.py") >= {"data", "evaluate", "files", "visualize"}
    assert imports(package / "cli" / "verbs" / "info.py") >= {"cli", "evaluate", "checkpoint"}
    assert imports(package / "hosts" / "attach.py") >= {"config", "engines", "method"}


def imported_files(path: Path) -> set[Path]:
    """The files of ltmp that a file imports, types and what functions import included."""
    package = ROOT / "src" / "ltmp"
    folder, found = path.parent, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder.joinpath(*[".."] * (node.level - 1)).resolve()
            base = base.joinpath(*node.module.split(".")) if node.module else base
            for name in (alias.name for alias in node.names):
                places = (
                    base / f"{name}.py",
                    base / name / "__init__.py",
                    base.with_suffix(".py"),
                    base / "__init__.py",
                )
                found.add(next(place for place in places if place.is_file() and package in place.parents))
    return found - {path}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected parts of more than one node (Tarjan 1972)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            part = [stack.pop()]
            while part[-1] != node:
                part.append(stack.pop())
            found.append(sorted(part))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return [part for part in found if len(part) > 1]


def test_no_circle_of_files():
    package = ROOT / "src" / "ltmp"
    files = sorted(package.rglob("*.py"))
    names = {path: path.relative_to(package).as_posix() for path in files}
    graph = {names[path]: {names[other] for other in imported_files(path)} for path in files}
    assert len(graph) > 100
    assert "deploy.py" in graph["predict/predictor.py"]
    assert "predict/ray.py" in graph["predict/run.py"]
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]
    assert circles(graph) == []


def test_a_name_means_one_thing():
    named = [
        (node.name, path.relative_to(ROOT).as_posix())
        for path in sorted((ROOT / "src" / "ltmp").rglob("*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef)
    ]
    assert len(named) > 150
    twice = {name for name, times in Counter(name for name, _ in named).items() if times > 1}
    assert [one for one in named if one[0] in twice] == []


def is_kernel(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton or numba compiles a function: those take pointers and sizes one by one."""
    decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
    return re.search(r"\b(triton\.jit|compiled|inlined)\b", decorators) is not None


@pytest.mark.parametrize("path", sorted((ROOT / "src" / "ltmp").rglob("*.py")), ids=lambda path: path.stem)
def test_functions_are_short_and_take_few_arguments(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs)
            assert count <= 12 or is_kernel(node), f"{node.name} takes {count} arguments: group them in a dataclass"
            # the app's page is one layout
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= 80 or node.name == "build_page", f"{node.name} has {lines} lines: split it"
