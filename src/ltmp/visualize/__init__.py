"""Pictures of what a reduced model does: which patch became part of which token, and accuracy against cost."""

from .animation import save_film as save_film
from .curves import plot_tradeoff as plot_tradeoff
from .groups import ReducedView as ReducedView
from .groups import patch_groups as patch_groups
from .groups import see as see
from .overlay import paint_groups as paint_groups
from .pictures import figure as figure
from .pictures import frames as frames
from .pictures import paint_last as paint_last
from .pictures import panel as panel
from .pictures import strip as strip
