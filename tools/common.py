"""Shared by train.py and validate_timm.py, the command lines of the paper's code: options, model, data and errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from torch import nn

from ltmp.cli.options import DataOptions, ModelOptions
from ltmp.data import Loader
from ltmp.errors import LTMPError
from ltmp.zoo.timm_names import parse_name


def add_options(parser: argparse.ArgumentParser, batch_size: int) -> None:
    """Add the options of both command lines, named as in timm's scripts."""
    parser.add_argument("data_dir", help="folder of class folders, or one with train/ and val/")
    parser.add_argument("--model", required=True, help="timm model name, e.g. ltmp_deit_small_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="use timm's pretrained weights")
    parser.add_argument("--initial-checkpoint", "--weights", dest="weights", type=Path, help="weights of the model")
    parser.add_argument("-b", "--batch-size", type=int, default=batch_size)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--class-map", type=Path, help="text file of class names, one per line, in head order")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")


def build(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """The dense model behind an `ltmp_*` name, with its weights."""
    name = parse_name(args.model)[1]
    options = ModelOptions(
        weights=weights,
        pretrained=args.pretrained,
        num_classes=args.num_classes,
        img_size=args.img_size,
        model_kwargs=args.model_kwargs,
    )
    return options.build(name)


def variant(args: argparse.Namespace) -> str:
    """The variant in the model's name; a plain timm name means merging, then pruning."""
    return parse_name(args.model)[0] or "ltmp"


def open_images(
    args: argparse.Namespace, model: nn.Module, split: str, *, shuffle: bool = False, augment: bool = False
) -> Loader:
    """Batches of a split of the data folder."""
    options = DataOptions(class_map=args.class_map, batch_size=args.batch_size, workers=args.workers)
    seed = getattr(args, "seed", 0)
    return options.open(args.data_dir, model, split=split, shuffle=shuffle, seed=seed, augment=augment)


def log(message: str) -> None:
    """Print progress or an error to stderr; results go to stdout."""
    print(message, file=sys.stderr, flush=True)


def run(job: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `job` and return its exit code; errors that the user can act on are printed as one sentence."""
    try:
        job(args)
    except LTMPError as error:
        log(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        log("interrupted")
        return 130
    return 0
