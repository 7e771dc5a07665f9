#!/usr/bin/env python3
"""For every model of transformers with image patches: does it attach, and does its tower match dense when off?

Each class is built on the meta device, a few blocks deep, without weights and computation. Towers that attach are built
again, small and with random weights, and run masked with thresholds off, then masked and packed with thresholds on.
Nothing is downloaded. Writes the section of docs/hosts.md between `<!-- begin: python tools/walk_transformers.py -->`
and `<!-- end -->`; with --check, only fails if it is stale.

    python tools/walk_transformers.py     # a few minutes on one core
    python tools/walk_transformers.py --list 'Llava*' 'Dinov2*'
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import re
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

import ltmp
from ltmp.hosts.attach import attachment

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hosts.md"
BLOCK = re.compile(r"(?P<begin><!-- begin: python tools/walk_transformers.py -->\n).*?(?P<end><!-- end -->)", re.DOTALL)
TOLERANCE = 1e-5
"""Largest difference allowed between attached and dense, relative to the largest output."""

_PIXELS = {"image_size", "num_channels", "in_channels", "num_frames"}
_DEEP = ("num_hidden_layers", "depth", "num_layers", "encoder_layers", "decoder_layers", "n_layer")
_STAGES = ("stage_names", "out_features", "out_indices", "transformers_version", "model_type", "architectures")
_SMALL = {
    **dict.fromkeys(_DEEP, 2), **dict.fromkeys(("num_attention_heads", "num_heads", "attention_heads"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim"), 48), **dict.fromkeys(("intermediate_size", "mlp_dim"), 64),
    "out_hidden_size": 48, "head_dim": 24,
}  # fmt: skip


class Finding(NamedTuple):
    """Result for one class.

    `status` is "matches", "attaches" (its tower was not run), "differs", "refused", "not built" or "no host".
    """

    name: str
    status: str
    reason: str = ""
    host: str = ""


def classes() -> dict[str, type[Any]]:
    """From class name to config class, for all models that take images in patches, with or without a head."""
    configs: dict[str, type[Any]] = {}
    mappings = [mapping for name, mapping in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    for kind, names in (row for mapping in mappings for row in mapping.items()):
        config = getattr(transformers, configuration_auto.CONFIG_MAPPING_NAMES.get(kind, "?"), None)
        if config is not None and _has_patches(config):
            configs |= dict.fromkeys([names] if isinstance(names, str) else names, config)
    no_models = ("Config", "Processor", "ProcessorFast", "Tokenizer")
    return {name: configs[name] for name in sorted(configs) if not name.endswith(no_models)}


@cache
def _has_patches(config: type[Any]) -> bool:
    try:
        return any("patch_size" in vars(part) and vars(part).keys() & _PIXELS for part in _parts(config()))
    except Exception:
        return False


def _parts(config: Any) -> Iterator[Any]:
    """A config and the configs nested in it."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, transformers.PretrainedConfig):
            yield from _parts(value)


def walk(name: str, config: type[Any]) -> Finding:
    """Build a class, attach it and compare its tower with dense."""
    try:
        settings = config()
        for part in _parts(settings):
            for deep in set(_DEEP) & vars(part).keys():
                if isinstance(getattr(part, deep), int):
                    setattr(part, deep, min(6, getattr(part, deep)))
            if isinstance(vars(part).get("layer_types"), list):
                part.layer_types = part.layer_types[:6]
        with torch.device("meta"):
            model = getattr(transformers, name)(settings)
    except Exception as error:
        return Finding(name, "not built", f"{type(error).__name__}: {error}".splitlines()[0][:80])
    try:
        ltmp.attach(model)
    except ltmp.LTMPError as error:
        reason = str(error)
        if "none of the known hosts" in reason:
            return Finding(name, "no host")
        return Finding(name, "refused", reason.partition(": ")[2].partition("; docs/")[0])
    host = attachment(model).host
    difference = off_difference(host)
    if difference is None:
        return Finding(name, "attaches", host=type(host).__name__)
    return Finding(name, "matches" if difference <= TOLERANCE else "differs", f"{difference:.0e}", type(host).__name__)


_MEASURED: dict[type[nn.Module], float | None] = {}


def off_difference(host: Any) -> float | None:
    """Relative difference of a small tower from dense with thresholds off, or of masked from packed with thresholds on.

    None if the tower could not be run.
    """
    kind = type(host)
    if kind not in _MEASURED:
        try:
            _MEASURED[kind] = _measure(host)
        except Exception:
            _MEASURED[kind] = None
    return _MEASURED[kind]


@torch.no_grad()
def _measure(host: Any) -> float:
    config = copy.deepcopy(host.config)
    for part in _parts(config):
        for small in _SMALL.keys() & vars(part).keys():
            if isinstance(getattr(part, small), int):
                setattr(part, small, _SMALL[small])
        if isinstance(vars(part).get("patch_size"), int) and isinstance(vars(part).get("image_size"), int):
            part.image_size = 4 * part.patch_size
    if hasattr(config, "stage_names"):
        settings = {name: value for name, value in config.to_dict().items() if name not in _STAGES}
        config = type(config)(**settings, out_features=["stage1", "stage2"])
    if hasattr(config, "fullatt_block_indexes"):
        config.fullatt_block_indexes = [1]
    if getattr(config, "mask_ratio", 0):
        config.mask_ratio = 0.0
    torch.manual_seed(0)
    tower = type(host)(config).eval()
    for parameter in tower.parameters():
        parameter.normal_(0, 0.3 / max(1, parameter.ndim - 1)).add_(float(parameter.ndim == 1))
    inputs = _inputs(config)
    dense = _tensor(tower(**inputs))
    thresholds = ltmp.attach(tower, ltmp.LTMPConfig(tokens="grid")).ltmp.train().requires_grad_()
    off = _tensor(tower(**inputs)) - dense
    with ltmp.record() as calls:
        tower(**inputs)
    depth = len(calls.kept[0][0])
    thresholds.set([0.7] * depth, [0.5 / calls.geometry[0].tokens] * depth)
    masked = _tensor(tower(**inputs))
    apart = masked - _tensor(tower.eval().requires_grad_(False)(**inputs))
    return float(max(off.abs().max(), apart.abs().max()) / dense.abs().max())


def _inputs(config: Any) -> dict[str, Any]:
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
    if hasattr(config, "spatial_merge_size") and hasattr(config, "temporal_patch_size"):
        rows = torch.randn(16, channels * config.temporal_patch_size * patch * patch)
        return {"hidden_states": rows, "grid_thw": torch.tensor([[1, 4, 4]])}
    size = getattr(config, "image_size", 4 * patch)
    high, wide = (size, size) if isinstance(size, int) else size
    frames = (config.num_frames,) if getattr(config, "num_frames", None) else ()
    return {"pixel_values": torch.randn(1, *frames, channels, high, wide)}


def _tensor(output: Any) -> Tensor:
    for name in ("last_hidden_state", "logits", "feature_maps", "image_embeds"):
        value = getattr(output, name, None)
        if value is not None:
            return value[-1] if isinstance(value, tuple) else value
    raise ValueError("nothing to compare")


def section(findings: list[Finding]) -> str:
    """The section of the page, in Markdown."""
    kinds = {
        "matches": f"attaches; its tower matches dense when off, and packed when masked, within {TOLERANCE:.0e}",
        "attaches": "attaches; its tower needs more than pixels, and is compared by the tests",
        "differs": "attaches and differs",
        "not built": "its default config builds nothing",
        "no host": "no plain vision transformer inside (windows, stages, convolutions, no tower)",
    }  # fmt: skip
    lines = [
        f"transformers {transformers.__version__}: {len(findings)} classes.",
        "",
        "| outcome | classes |",
        "| --- | --- |",
    ]
    for status, what in kinds.items():
        names = [finding.name for finding in findings if finding.status == status]
        if names:
            listed = f": {', '.join(names)}" if status in ("matches", "attaches", "differs") else ""
            lines.append(f"| {what} | {len(names)}{listed} |")
    refused = [finding for finding in findings if finding.status == "refused"]
    for reason in dict.fromkeys(finding.reason for finding in refused):
        names = [finding.name for finding in refused if finding.reason == reason]
        lines.append(f"| refused: {reason.replace('|', '/')} | {len(names)}: {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("patterns", nargs="*", help="only classes that match one of these; implies --list")
    parser.add_argument("--list", action="store_true", help="print the results, one class per line")
    parser.add_argument("--check", action="store_true", help="fail if the page is stale")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    selected = classes()
    if arguments.patterns:
        selected = {n: c for n, c in selected.items() if any(fnmatch.fnmatch(n, p) for p in arguments.patterns)}
    findings = []
    for i, (name, config) in enumerate(selected.items(), 1):
        print(f"\r{i}/{len(selected)} {name:60}", end="", file=sys.stderr, flush=True)
        findings.append(walk(name, config))
    print(file=sys.stderr)
    if arguments.list or arguments.patterns:
        print("\n".join("\t".join(finding) for finding in findings))
        return 0
    text = PAGE.read_text()
    page = BLOCK.sub(lambda match: f"{match['begin']}\n{section(findings)}\n{match['end']}", text)
    if arguments.check:
        return int(text != page)
    PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
