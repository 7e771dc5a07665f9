"""Learned Thresholds token Merging and Pruning: make a vision transformer cheaper without hurting its accuracy.

>>> import ltmp, timm
>>> model = ltmp.attach(timm.create_model("deit_small_patch16_224", pretrained=True).eval())
>>> ltmp.learn(model, loader, target=0.6)
>>> ltmp.save(model, "deit_small_0.60.safetensors")
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import _moved
from ._version import __version__ as __version__
from .zoo import timm_hook as _timm_hook

if TYPE_CHECKING:
    from .bundle import pack as pack
    from .calls import Trace as Trace
    from .calls import dense as dense
    from .calls import record as record
    from .calls import trace as trace
    from .calls import unmerge as unmerge
    from .certification import Certificate as Certificate
    from .certification import certify as certify
    from .checkpoint import load as load
    from .checkpoint import save as save
    from .config import LTMPConfig as LTMPConfig
    from .errors import LTMPError as LTMPError
    from .evaluate.costs import measure_costs as measure_costs
    from .evaluate.latency import Costs as Costs
    from .evaluate.latency import set_latency as set_latency
    from .hosts.attach import attach as attach
    from .hosts.attach import detach as detach
    from .hub import from_pretrained as from_pretrained
    from .hub import push_to_hub as push_to_hub
    from .learning import DialResult as DialResult
    from .learning import LearnResult as LearnResult
    from .learning import learn as learn
    from .learning import learn_dial as learn_dial
    from .learning import tune as tune
    from .state import ModelSummary as ModelSummary
    from .state import summary as summary

_PUBLIC = {
    "bundle": ("pack",),
    "calls": ("Trace", "dense", "record", "trace", "unmerge"),
    "certification": ("Certificate", "certify"),
    "checkpoint": ("load", "save"),
    "config": ("LTMPConfig",),
    "errors": ("LTMPError",),
    "evaluate.costs": ("measure_costs",),
    "evaluate.latency": ("Costs", "set_latency"),
    "hosts.attach": ("attach", "detach"),
    "hub": ("from_pretrained", "push_to_hub"),
    "learning": ("DialResult", "LearnResult", "learn", "learn_dial", "tune"),
    "state": ("ModelSummary", "summary"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import public names on first use (PEP 562): importing torch takes seconds, and `ltmp --help` does not need it."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f".{name}", __name__):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, "__doc__", "__file__", "__name__", "__path__", "__version__"])


_timm_hook.install()
_moved.install()
