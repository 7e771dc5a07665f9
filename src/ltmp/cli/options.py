"""The options that several verbs share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ATTENTION, SCORES, LTMPConfig
from ..errors import UsageError

_MODEL, _DATA, _RUN, _OUTPUT = "Model", "Data", "Running", "Output"

Model = Annotated[
    str,
    typer.Option(
        help="timm model name, e.g. deit_small_patch16_224, or hf:NAME_OR_FOLDER of a Hugging Face classifier, "
        "torchvision:NAME, or open_clip:NAME/WEIGHTS.",
        rich_help_panel=_MODEL,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(help="Checkpoint of the model (.safetensors, .pth, .pth.tar).", rich_help_panel=_MODEL),
]
Pretrained = Annotated[bool, typer.Option(help="Take timm's pretrained weights instead.", rich_help_panel=_MODEL)]
NumClasses = Annotated[int | None, typer.Option(help="Outputs of the model's head.", rich_help_panel=_MODEL)]
ImageSize = Annotated[
    int | None, typer.Option("--img-size", help="Pixels a side; default: the model's own.", rich_help_panel=_MODEL)
]
ModelKwargs = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="More arguments of the model; may be repeated.", rich_help_panel=_MODEL),
]

Data = Annotated[
    str,
    typer.Option(
        help="Folder or .tar of class folders, flat folder of images, or a timm dataset (hfds/..., torch/...).",
        rich_help_panel=_DATA,
    ),
]
Split = Annotated[
    str | None,
    typer.Option(help="Split of the data; a folder's train/ or val/ is found by itself.", rich_help_panel=_DATA),
]
DataRoot = Annotated[Path | None, typer.Option(help="Where a timm dataset lies on disk.", rich_help_panel=_DATA)]
ClassMap = Annotated[
    Path | None,
    typer.Option(help="The model's class names, one a line (.txt), where folders differ.", rich_help_panel=_DATA),
]
Interpolation = Annotated[
    str | None, typer.Option(help="Resizing: bicubic, bilinear, ...; default: the model's.", rich_help_panel=_DATA)
]
Mean = Annotated[tuple[float, float, float] | None, typer.Option(help="Mean of the channels.", rich_help_panel=_DATA)]
Std = Annotated[
    tuple[float, float, float] | None,
    typer.Option(help="Standard deviation of the channels.", rich_help_panel=_DATA),
]
CropPct = Annotated[float | None, typer.Option(help="Share of the resized image kept; 1: all.", rich_help_panel=_DATA)]
CropMode = Annotated[
    str | None, typer.Option(help="center, squash (ignores the aspect ratio) or border.", rich_help_panel=_DATA)
]
Strict = Annotated[
    bool, typer.Option(help="Refuse an image that cannot be read instead of skipping it.", rich_help_panel=_DATA)
]

BatchSize = Annotated[int, typer.Option(min=1, help="Images a batch.", rich_help_panel=_RUN)]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.", rich_help_panel=_RUN)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or auto.", rich_help_panel=_RUN)]
Amp = Annotated[bool, typer.Option(help="bfloat16 autocast.", rich_help_panel=_RUN)]
Engine = Annotated[
    str | None, typer.Option(help="auto, packed, triton or graph; default: as learned.", rich_help_panel=_RUN)
]
Variant = Annotated[
    str, typer.Option(help="ltmp: merge, then prune; ltpm: the other way round; ltm: merge only; ltp: prune only.")
]
Scores = Annotated[
    str,
    typer.Option(
        help="What tokens are scored by: as in the paper; attention: {similarity}, {matching}, size power {size_power} "
        "and class power {class_power}, by forward passes alone; or best: a probe learned from gradients, which adds "
        "half a megabyte or so to the file. What is given below goes before it.".format(**ATTENTION)
    ),
]
Similarity = Annotated[
    str | None,
    typer.Option(
        help="Tokens are alike by the mean of their keys (mean, the paper's), by all heads, or by a learned probe."
    ),
]
Matching = Annotated[
    str | None,
    typer.Option(help="Even tokens merge into odd ones (bipartite, the paper's), or the mutually nearest (mutual)."),
]
Importance = Annotated[
    str | None,
    typer.Option(
        help="What pruning goes by: attention received, class (the class token's attention), or a learned probe."
    ),
]
SizePower = Annotated[
    float | None,
    typer.Option(
        help="A token of s patches counts as s to this power in the first block's attention, rising to 1 in the last; "
        "the paper's is 1."
    ),
]
ClassPower = Annotated[
    float | None,
    typer.Option(
        help="Merge and prune less what the class token attends to: in the last block 1 - cosine counts times that "
        "attention to this power, and importance has this part of it; both rise evenly to that. The paper's is 0."
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="FLOPs share to set the thresholds' dial to, e.g. 0.55; default: as the file was saved.",
        rich_help_panel=_RUN,
    ),
]
Milliseconds = Annotated[
    float | None,
    typer.Option(
        help="Instead of --budget: the time that a batch may take here; the largest budget that meets it is found.",
        rich_help_panel=_RUN,
    ),
]
ImagesPerSecond = Annotated[
    float | None, typer.Option(help="Instead of --budget: the speed wanted here.", rich_help_panel=_RUN)
]
Budgets = Annotated[
    list[float] | None,
    typer.Option(
        "--budget",
        metavar="SHARE",
        help="FLOPs share to set the thresholds' dial to; may be repeated. Default: as the file was saved.",
        rich_help_panel=_RUN,
    ),
]
Form = Annotated[
    str,
    typer.Option(
        help="Of exports: single (one image), batch (any number of images) or static (no data-dependent shapes).",
        rich_help_panel=_RUN,
    ),
]
Int8 = Annotated[bool, typer.Option("--int8", help="Quantise the linear layers (ONNX only).", rich_help_panel=_RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=_OUTPUT)]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; - is the screen.", rich_help_panel=_OUTPUT),
]
Csv = Annotated[
    str | None,
    typer.Option("--csv", metavar="FILE", help="Write the table as CSV; - is the screen.", rich_help_panel=_OUTPUT),
]


Thresholds = Annotated[Path, typer.Option(help="The file that `ltmp learn` wrote, its folder, or USER/REPO.")]


ModelName = Annotated[
    str | None,
    typer.Option("--model", help="timm model name; default: the one in the thresholds file.", rich_help_panel="Model"),
]


def settings_of(scores: str) -> dict[str, Any]:
    """What `--scores` stands for."""
    if scores not in SCORES:
        raise UsageError(f"unknown scores {scores!r}: expected one of {', '.join(SCORES)}")
    return SCORES[scores]


def config_of(
    scores: str, variant: str, similarity: str | None, matching: str | None, importance: str | None,
    size_power: float | None, class_power: float | None,
) -> LTMPConfig:  # fmt: skip
    """The settings that verbs ask for, as `scores` says where they are None; a wrong one is a usage error."""
    named = settings_of(scores)
    settings = {"variant": variant, "similarity": similarity, "matching": matching, "importance": importance,
                "size_power": size_power, "class_power": class_power}  # fmt: skip
    asked: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    try:
        return LTMPConfig(**{**named, **asked})
    except ValueError as error:
        raise UsageError(str(error)) from error
