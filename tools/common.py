"""What the two command lines of the paper's code share: options, the model, its data, and how a failure is told."""

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
    """Options of both command lines, under the names they have in timm's scripts."""
    parser.add_argument("data_dir", help="folder of class folders, or one with train/ and val/")
    parser.add_argument("--model", required=True, help="timm model name, e.g. ltmp_deit_small_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="take timm's weights")
    parser.add_argument("--initial-checkpoint", "--weights", dest="weights", type=Path, help="the model's weights")
    parser.add_argument("-b", "--batch-size", type=int, default=batch_size)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--model-kwargs", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--class-map", type=Path, help="text file of class names, one a line, in the head's order")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--amp", action="store_true", help="compute in bfloat16")


def build(args: argparse.Namespace, weights: Path | None) -> nn.Module:
    """The model behind an `ltmp_*` name, dense, with its weights."""
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
    """The variant that the model's name says; a plain timm name means merge, then prune."""
    return parse_name(args.model)[0] or "ltmp"


def open_images(
    args: argparse.Namespace, model: nn.Module, split: str, *, shuffle: bool = False, augment: bool = False
) -> Loader:
    """Batches of a split of the data folder."""
    options = DataOptions(class_map=args.class_map, batch_size=args.batch_size, workers=args.workers)
    seed = getattr(args, "seed", 0)
    return options.open(args.data_dir, model, split=split, shuffle=shuffle, seed=seed, augment=augment)


def tell(message: str) -> None:
    """Progress goes to stderr, results to stdout."""
    print(message, file=sys.stderr, flush=True)


def run(job: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """The exit code of `job`; a failure the user can act on is one sentence."""
    try:
        job(args)
    except LTMPError as error:
        tell(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    return 0
