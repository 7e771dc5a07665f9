"""Figures of other papers on ImageNet, to stand beside measured ones; each names the table that it is from."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_suffix(".csv")


@dataclass(frozen=True)
class Published:
    """A row of a paper's table.

    Attributes:
        model: timm's name; method: with what was trained.
        top1, dense: percent on ImageNet's validation images, reduced and not.
        gmacs, dense_gmacs: 10^9 multiply-adds of the whole model, as the paper rounds them.
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
        """FLOPs over the dense model's, embedding and head included."""
        return self.gmacs / self.dense_gmacs


def published(model: str) -> list[Published]:
    """What is known of a timm model, with or without the tag of its weights."""
    with FILE.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model.partition(".")[0]]
    return [
        Published(
            row["model"], row["method"], float(row["top1"]), float(row["dense"]), float(row["gmacs"]),
            float(row["dense_gmacs"]), row["source"],
        )
        for row in rows
    ]  # fmt: skip
