"""Settings of the paper's own training that are needed outside `ltmp.learning`, too."""

from __future__ import annotations

from .thresholds import Thresholds


def set_paper_start(thresholds: Thresholds) -> None:
    """Set the thresholds that the paper's training starts from: merge 0.9 and prune 0, for the variant's steps."""
    depth = thresholds.depth
    thresholds.set([0.9] * depth if "merge" in thresholds.config.steps else None, [0.0] * depth)
