"""Published ImageNet results of other methods, to compare with measured ones; each row cites paper and table."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Published:
    """A row of a paper's table.

    Attributes:
        model: name in timm.
        method: name of the method, and what was trained.
        top1, dense: top-1 accuracy on the ImageNet validation set in percent, reduced and dense.
        gmacs, dense_gmacs: 10^9 multiply-adds of the entire model, rounded as in the paper.
        source: paper and table.
    """

    model: str
    method: str
    top1: float
    dense: float
    gmacs: float
    dense_gmacs: float
    source: str

    @property
    def share(self) -> float:
        """FLOPs relative to the dense model, embedding and head included."""
        return self.gmacs / self.dense_gmacs


def published(model: str) -> list[Published]:
    """Published results for a timm model, named with or without its pretrained tag."""
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model.partition(".")[0]]
    return [
        Published(
            row["model"], row["method"], float(row["top1"]), float(row["dense"]), float(row["gmacs"]),
            float(row["dense_gmacs"]), row["source"],
        )
        for row in rows
    ]  # fmt: skip
