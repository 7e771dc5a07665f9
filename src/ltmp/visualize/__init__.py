"""See what a reduced model does: which patch became which token, and what accuracy costs."""

from .curves import plot_tradeoff as plot_tradeoff
from .groups import patch_groups as patch_groups
from .overlay import paint_groups as paint_groups
