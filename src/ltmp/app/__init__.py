"""An interactive page: choose a picture and a budget, and see which tokens are left.

>>> from ltmp.app import Budgets, Explorer, build_page
>>> page = build_page(Explorer(model, Budgets.from_files(model, ["thresholds.safetensors"])))
>>> page.launch()

The page needs the extra `app`.
"""

from .budgets import Budgets as Budgets
from .explorer import Explorer as Explorer
from .page import build_page as build_page
from .page import serving_options as serving_options
