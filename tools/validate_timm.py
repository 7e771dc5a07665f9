"""Evaluate learned thresholds with the command line of the paper's code, at any batch size.

python tools/validate_timm.py /path/to/imagenet --model ltmp_deit_small_patch16_224 --checkpoint FILE -b 1
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import add_options, build, open_images, run, variant

import ltmp
from ltmp.checkpoint import apply, read
from ltmp.checkpoint.contents import split_thresholds
from ltmp.cli.options import autocast_type, pick_device
from ltmp.errors import UsageError
from ltmp.evaluate import evaluate, tables
from ltmp.files.tensors import read_state_dict


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=64)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        help="full checkpoint or thresholds only, of the paper's code or of ltmp; "
        "thresholds only also need --pretrained or --weights",
    )
    parser.add_argument("--engine", default="auto", help="engine of the reduced model: auto, packed, triton or graph")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args(arguments)


def validate(args: argparse.Namespace) -> None:
    file = read(args.checkpoint)
    weights = args.weights or (args.checkpoint if holds_weights(args.checkpoint) else None)
    if weights is None and not args.pretrained:
        raise UsageError(f"{args.checkpoint} holds thresholds only: add --pretrained, or --weights FILE")
    model = ltmp.attach(build(args, weights), ltmp.LTMPConfig(variant=variant(args), engine=args.engine))
    apply(model, file, source=str(args.checkpoint))
    images = open_images(args, model, "validation")
    result = evaluate(model, images, device=pick_device(args.device), amp=autocast_type(args.amp))
    tables.show(tables.comparison(result), f"{args.model}, {result.images} images")
    if args.json:
        tables.write_json(tables.as_json(result, model=args.model, checkpoint=str(args.checkpoint)), args.json)


def holds_weights(path: Path) -> bool:
    """Whether a file with thresholds is a full checkpoint. Thresholds files of ltmp are not: they have metadata."""
    return not read(path).metadata and bool(split_thresholds(read_state_dict(path))[1])


if __name__ == "__main__":
    sys.exit(run(validate, parse()))
