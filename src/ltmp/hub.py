"""Share thresholds on the Hugging Face Hub: a few KB per budget, and a model card with the measurements."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .bundle import Bundle
from .checkpoint import annotate, load, read, save
from .errors import LTMPError, UsageError
from .evaluate import Evaluation, tables
from .files.text import read_text
from .locate import DIAL, FILES, PREFIX, download, file_name, hub_errors, locate
from .method.certificate import Certificate
from .zoo.build import is_safe_name
from .zoo.hugging_face import PREFIX as HF

PAPER = "https://openreview.net/forum?id=WYKTCKpImz"
START, END = "<!-- ltmp: this part is written anew by each push -->", "<!-- /ltmp -->"
MAX_CARD = 1 << 24
"""Limit of an existing model card in bytes."""


def from_pretrained(
    source: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    budget: float | None = None,
    engine: str | None = None,
    certified: bool = False,
    weights: str | os.PathLike[str] | None = None,
    **hub: Any,
) -> nn.Module:
    """Return a model that runs reduced, with thresholds from the Hugging Face Hub, a folder or a file.

    >>> model = ltmp.from_pretrained("user/deit-small-ltmp", budget=0.6)

    Args:
        source: USER/REPO, a folder or a file; see `locate`.
        model: the model they were learned on; None builds the one in a folder that `pack` wrote, or the base model that
            the file names, with its weights.
        budget: what to set the dial to; without a dial, which of several files to load.
        engine: overrides the file's engine.
        certified: set the dial to the budget that its certificate guarantees; see `load`.
        weights: a checkpoint for the model that is built, instead of the base model's own.
        hub: further arguments of the download: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `model`, or the model that was built, in evaluation mode.

    Raises:
        UsageError: the file names a repository whose weights are not loaded without the caller's consent.
        LTMPError: there is nothing by that name, it is not for this model, or the file names no base model and none is
            given.
    """
    path = locate(source, budget=budget, **hub)
    if model is None:
        model = _build(Bundle.open(path, budget=budget), weights, source=os.fspath(source))
    load(model, path, engine=engine, budget=budget, certified=certified)
    return model


def _build(bundle: Bundle, weights: str | os.PathLike[str] | None, source: str) -> nn.Module:
    """Build the model that thresholds were learned on, with the given, the packed or the base model's weights."""
    about = bundle.about
    if weights is not None or bundle.weights is not None:
        return bundle.build(weights=weights)
    if bundle.name is not None and bundle.name.startswith(HF):
        return bundle.build()
    if not about.base_model:
        raise LTMPError(
            f"{source} does not say whose weights its thresholds were learned on: give the model, "
            "ltmp.from_pretrained(source, model)"
        )
    return bundle.build(_base_model_name(about.base_model, about.library, source), pretrained=True)


def _base_model_name(base_model: str, library: str | None, source: str) -> str:
    """The name to build the model of a repository by.

    Raises:
        UsageError: its weights may not be loaded just because a file says so.
    """
    # timm finds its own repositories by the model's name
    name = base_model.removeprefix("timm/")
    if name != base_model and is_safe_name(name):
        return name
    # loaded from safetensors only, which cannot run code
    if library == "transformers":
        return f"{HF}{base_model}"
    raise UsageError(
        f"{source} is for the weights in {base_model}: someone else's file may not choose where weights are loaded "
        "from; if you trust that repository, build its model and pass it, ltmp.from_pretrained(source, model)"
    )


def push_to_hub(
    source: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str | None = None,
    budget: float | None = None,
    **metadata: Any,
) -> str:
    """Upload thresholds to a repository of the Hugging Face Hub, with a model card of all the thresholds there.

    The file is named thresholds-BUDGET.safetensors after the target it was learned for, so that one repository can hold
    several, or thresholds-dial.safetensors if it has a dial. A repository that does not exist is created.

    Args:
        source: an attached model, or a file that `save` wrote.
        repo_id: USER/REPO.
        base_model: the repository of the model's own weights, e.g. timm/deit_small_patch16_224.fb_in1k.
        evaluation: the result of `evaluate`, or the JSON of `ltmp eval --json`, for the card and for the file.
        private: create the repository as private.
        revision: the branch to push to.
        token: used instead of that of `hf auth login`.
        message: of the commit.
        budget: the dial's default, for users who load the file without a budget; None leaves it as it is.
        metadata: further entries for the file, such as `target`, `model_name`, `dataset`.

    Returns:
        The repository's URL.

    Raises:
        LTMPError: not thresholds, no permission, or no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    new_metadata = {**metadata, **measured(evaluation), **({"base_model": base_model} if base_model else {})}
    new_metadata |= {} if budget is None else {"budget": budget}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new.safetensors"
        if isinstance(source, nn.Module):
            save(source, path)
        annotate(path if isinstance(source, nn.Module) else locate(source, budget=budget), path, **new_metadata)
        added = read(path)
        file = file_name(added.metadata.get("target")) if added.dial is None else DIAL
        api = HfApi(token=token)
        with hub_errors(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            existing = download(url.repo_id, [FILES, "README.md"], revision=revision, token=token)
            files = {**{p.name: read(p).metadata for p in existing.glob(FILES)}, file: added.metadata}
            old_card = existing / "README.md"
            text = card(url.repo_id, files, read_text(old_card, MAX_CARD) if old_card.exists() else None)
            operations = [CommitOperationAdd(file, path), CommitOperationAdd("README.md", text.encode())]
            api.create_commit(url.repo_id, operations, commit_message=message or f"Add {file}", revision=revision)
    return str(url)


def measured(evaluation: Evaluation | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the results of an evaluation that are stored in a thresholds file; accuracies in percent.

    Raises:
        LTMPError: it is not an evaluation.
    """
    if evaluation is None:
        return {}
    values: Mapping[str, Any] = asdict(evaluation) if is_dataclass(evaluation) else evaluation
    if not {"share", "images"} <= values.keys():
        raise LTMPError("this is not an evaluation: expected what `ltmp eval --json FILE` writes")
    stored = {name: values.get(name) for name in ("images", "top1", "agreement", "share", "device")}
    stored |= {"top1_dense": values.get("dense_top1"), "speed": values.get("throughput")}
    return {name: value for name, value in stored.items() if value is not None}


def card(repo_id: str, files: Mapping[str, Mapping[str, Any]], before: str | None = None) -> str:
    """Return the model card of a repository, made from the metadata of its files only.

    Args:
        files: file names and their metadata.
        before: the existing card; text outside of ltmp's part is kept.
    """
    from huggingface_hub import ModelCard, ModelCardData

    part = f"{START}\n\n{_body(repo_id, files)}\n{END}"
    old = ModelCard(before, ignore_metadata_errors=True) if before else None
    data: Any = old.data if old else ModelCardData()
    text = old.text if old else f"\n# {repo_id.partition('/')[2]}\n\n{START}{END}\n"
    if START not in text or END not in text:
        text = f"{text.rstrip()}\n\n{START}{END}\n"
    head, tail = text[: text.index(START)], text[text.index(END) + len(END) :]
    data.library_name = "ltmp"
    data.tags = sorted({*(data.tags or ()), "ltmp", "token-merging", "token-pruning", "vision-transformer"})
    data.pipeline_tag = data.pipeline_tag or "image-classification"
    bases = sorted({about["base_model"] for about in files.values() if about.get("base_model")})
    if bases:
        data.base_model = bases[0] if len(bases) == 1 else bases
    if any(about.get("top1") is not None for about in files.values()):
        data.metrics = ["accuracy"]
    return f"---\n{data.to_yaml()}\n---\n{head}{part}{tail}"


def _body(repo_id: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [_row(name, about) for name, about in sorted(files.items())]
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return f"""Learned thresholds for token merging and pruning ([LTMP]({PAPER})):
two numbers per block, with which a frozen vision transformer merges similar tokens and prunes unimportant ones, image
by image. The model's own weights are not included and do not change.

{tables.markdown([{name: row[name] for name in columns} for row in rows])}
Budget (the target, or the range of a dial) and share (measured, mean over images) are fractions of the dense model's
FLOPs. Accuracies are in percent; "-" means not measured.

{_certified(files)}{_usage(repo_id, files)}
"""


def _row(name: str, about: Mapping[str, Any]) -> dict[str, object]:
    """The table row of one file."""
    dial, speed, device = about.get("dial"), about.get("speed"), about.get("device")
    if not isinstance(speed, Mapping):
        speed = {}
    return {
        "file": name,
        "model": about.get("model_name") or about.get("architecture"),
        "input": "x".join(map(str, about.get("input_size") or ())) or None,
        "budget": about.get("target") if dial is None else f"{dial[0]:g} to {dial[1]:g}",
        "set to": about.get("budget"),
        "share": about.get("share"),
        "top-1": about.get("top1"),
        "dense top-1": about.get("top1_dense"),
        "agree": about.get("agreement"),
        "images": about.get("images"),
        "speed-up": speed.get("speedup"),
        "img/s": speed.get("reduced"),
        "dense img/s": speed.get("dense"),
        "timed": f"batch {speed.get('batch_size')}{f', {device}' if device else ''}" if speed else None,
    }


def _certified(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The guarantees of the certified files, one line per file."""
    certificates = {name: Certificate.from_dict(about["certificate"], name) for name, about in sorted(files.items())
                    if about.get("certificate")}  # fmt: skip
    if not certificates:
        return ""
    lines = [f"- `{name}`, {certificate.sentence()}." for name, certificate in certificates.items()]
    return "\n".join(["Certified (`certified=True` sets that budget):", "", *lines, "", ""])


def _usage(repo_id: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """How to load the first file; without a known base model, with the reader's own model."""
    name, about = next(iter(sorted(files.items())))
    arguments = [f'"{repo_id}"']
    if not about.get("base_model"):
        arguments.append("model")
    dial = about.get("dial")
    budget = about.get("target") if dial is None else _example_budget(about)
    if budget is not None and (len(files) > 1 or dial is not None):
        arguments.append(f"budget={budget:g}")
    comment = "" if about.get("base_model") else "# model: the one that the thresholds were learned on\n"
    set_budget = "" if dial is None else f"model.ltmp.set_budget({dial[0]:g})  # at any time, in microseconds\n"
    return f"""```python
import ltmp

{comment}model = ltmp.from_pretrained({", ".join(arguments)})
{set_budget}```

On the command line, use `--thresholds {PREFIX}{repo_id}/{name}`."""


def _example_budget(about: Mapping[str, Any]) -> float:
    """A budget of a dial for the example: the one it was saved at, or the middle of its range."""
    return float(about.get("budget") or round(sum(about["dial"]) / 2, 2))
