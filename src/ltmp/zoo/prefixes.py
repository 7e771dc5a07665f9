"""Prefixes of the names that reduced models have in timm: `ltmp_vit_small_patch16_224`."""

from __future__ import annotations

from ..config import LEARNED, VARIANTS

INFERENCE = "inference_"
PREFIXES = (*(f"{variant}_" for variant in VARIANTS), *(f"{INFERENCE}{variant}_" for variant in LEARNED))
