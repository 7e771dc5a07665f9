#!/usr/bin/env python3
"""For every architecture in timm: does it attach, and does it still give the dense output with thresholds off?

Each is built on the meta device, without weights and computation. Those that attach are built again, with two blocks
and random weights, and run on one image. Nothing is downloaded.

    python tools/walk_timm.py --out timm.json     # about 20 minutes on one core
    python tools/walk_timm.py 'vit_tiny*' 'eva*'
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch

import ltmp
from ltmp.zoo.timm_names import parse_name

TOLERANCE = 1e-5
"""Largest difference allowed between attached and dense, relative to the largest output."""


def names(patterns: list[str]) -> list[str]:
    """Architectures of timm that match a pattern, without those that this package registers."""
    own = [name for name in timm.list_models() if parse_name(name)[0] is None]
    return [name for name in own if not patterns or any(fnmatch.fnmatch(name, p) for p in patterns)]


def walk(name: str) -> dict[str, Any]:
    """Name, timm's class (`host`), `status` ("matches", "differs", "refused", "no host") and `reason` of a model."""
    with torch.device("meta"):
        model = timm.create_model(name)
    facts = {"name": name, "host": type(model).__name__}
    try:
        ltmp.attach(model)
    except ltmp.LTMPError as error:
        reason = str(error)
        unknown = "none of the known hosts" in reason
        return {**facts, "status": "no host" if unknown else "refused", "reason": "" if unknown else reason}
    difference = off_difference(name)
    return {**facts, "status": "matches" if difference <= TOLERANCE else "differs", "reason": f"{difference:.1e}"}


@torch.no_grad()
def off_difference(name: str) -> float:
    """Relative difference of an attached model of two blocks, masked with thresholds off, from dense."""
    torch.manual_seed(0)
    # for some, 112 pixels are no multiple of the patch size (or of two patches); some have one list entry per block
    for i, less in enumerate(({"img_size": 112}, {}, {"num_kv_heads": 1})):
        try:
            model, images, dense = small(name, **less)
            break
        except Exception:
            if i == 2:
                raise
    ltmp.attach(model).ltmp.train().requires_grad_()
    return float((model(images) - dense).abs().max() / dense.abs().max())


def small(name: str, **less: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model with two blocks, an image, and its output."""
    model = timm.create_model(name, depth=2, **less).eval()
    for parameter in model.parameters():
        if parameter.ndim < 2 and not parameter.any():
            parameter.normal_(0, 0.02)  # a missing bias would go unnoticed if it were zero
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or timm.data.resolve_model_data_config(model)["input_size"][1:]
    images = torch.randn(1, 3, *size)
    return model, images, model(images)


def quick(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Fast random initialisation; timm's truncated normal would take most of the time."""
    return tensor.data.normal_(0, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="only architectures that match one of these")
    parser.add_argument("--out", type=Path, help="write all results to this file, as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.Tensor.erfinv_ = quick
    selected = names(arguments.patterns)
    results = []
    for i, name in enumerate(selected, 1):
        try:
            results.append(walk(name))
        except Exception as error:
            # a model that cannot be built is a result, too
            reason = f"{type(error).__name__}: {error}"
            results.append({"name": name, "host": "?", "status": "failed", "reason": reason})
        print(f"\r{i}/{len(selected)} {name:60}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for (status, host), count in sorted(Counter((r["status"], r["host"]) for r in results).items()):
        print(f"{count:5} {status:8} {host}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"timm": timm.__version__, "torch": torch.__version__, "found": results}))


if __name__ == "__main__":
    main()
