"""`ltmp push`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import UsageError
from ...files.text import read_json
from ...ranges import BUDGET
from ..options import option, verb


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """The repository and its model card."""

    evaluation: Annotated[
        Path | None, option("JSON written by `ltmp eval --json FILE`, with accuracy and speed for the model card.")
    ] = None
    base_model: Annotated[
        str | None, option("Repository of the base model's weights, e.g. timm/deit_small_patch16_224.fb_in1k.")
    ] = None
    budget: Annotated[
        float | None,
        option(
            "FLOPs share to which the dial is set when it is loaded without a budget; default: the one it was saved "
            "at.",
            metavar="SHARE",
            within=BUDGET,
        ),
    ] = None
    private: Annotated[bool, option("Create the repository as private.", None, "--private")] = False
    revision: Annotated[str | None, option("Branch to push to.")] = None
    message: Annotated[str | None, option("Commit message.")] = None


@verb
def push_verb(
    thresholds: Annotated[
        str, typer.Argument(help="File written by `ltmp dial` or `ltmp learn`, or the folder that holds it.")
    ],
    repo: Annotated[str, typer.Argument(help="USER/REPO on the Hugging Face Hub; created if it does not exist.")],
    options: PushOptions,
) -> None:
    """Share thresholds on the Hugging Face Hub, with a model card; one repository can hold several budgets.

    Log in first, with `hf auth login` or a token in HF_TOKEN.

    Example: ltmp push runs/deit/thresholds.safetensors user/deit-small-ltmp --evaluation result.json
    """
    from ...hub import push_to_hub
    from ..screen import print_result, suggest

    url = push_to_hub(
        thresholds,
        repo,
        base_model=options.base_model,
        evaluation=_read(options.evaluation) if options.evaluation else None,
        private=options.private or None,
        revision=options.revision,
        message=options.message,
        budget=options.budget,
    )
    print_result(url)
    suggest("ltmp", "info", repo)


def _read(path: Path) -> dict[str, Any]:
    """Read the JSON of an evaluation."""
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: expected the JSON that `ltmp eval --json FILE` writes") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected the JSON that `ltmp eval --json FILE` writes")
    return values
