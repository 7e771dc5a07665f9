"""Learned Thresholds token Merging and Pruning: make a vision transformer cheaper without hurting its accuracy.

>>> import ltmp, timm
>>> model = ltmp.attach(timm.create_model("deit_small_patch16_224", pretrained=True).eval())
>>> ltmp.learn(model, loader, target=0.6)
>>> ltmp.save(model, "deit_small_0.60.safetensors")
"""

from . import _moved
from ._version import __version__ as __version__
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
from .zoo.timm_names import install as _install

_install()
_moved.install()
