"""Thresholds on the Hugging Face Hub: a few KB a budget, and a card that says what was measured."""

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
from .locate import DIAL, FILES, PREFIX, download, file_name, locate, told
from .method.certificate import Certificate
from .zoo.build import is_safe_name
from .zoo.hugging_face import PREFIX as HF

PAPER = "https://openreview.net/forum?id=WYKTCKpImz"
START, END = "<!-- ltmp: this part is written anew by each push -->", "<!-- /ltmp -->"
MAX_CARD = 1 << 24


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
    """A model that runs reduced, by thresholds from the Hugging Face Hub, a folder or a file.

    >>> model = ltmp.from_pretrained("user/deit-small-ltmp", budget=0.6)

    Args:
        source: USER/REPO, a folder or a file; see `locate`.
        model: the model they were learned on; None builds the one in a folder that `pack` wrote, or the base model that
            the file states, with its weights.
        budget: what the dial is set to, or without a dial which file, where there are several.
        engine: overrides the file's engine.
        certified: set the dial to the budget that its certificate guarantees; see `load`.
        weights: a checkpoint for the model that is built, instead of the base model's own.
        hub: more for the download: `revision`, `token`, `cache_dir`, `local_files_only`.

    Returns:
        `model`, or the model built, in evaluation mode.

    Raises:
        UsageError: the file names a repository of somebody else's weights.
        LTMPError: nothing there by that name, not for this model, or no base model is stated and none given.
    """
    path = locate(source, budget=budget, **hub)
    if model is None:
        model = _build(Bundle.open(path, budget=budget), weights, source=os.fspath(source))
    load(model, path, engine=engine, budget=budget, certified=certified)
    return model


def _build(bundle: Bundle, weights: str | os.PathLike[str] | None, source: str) -> nn.Module:
    """The model that thresholds were learned on, with the weights given, those beside it, or those that it names."""
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
    return bundle.build(_built_as(about.base_model, about.library, source), pretrained=True)


def _built_as(base_model: str, library: str | None, source: str) -> str:
    """The name that a model in a repository is built by."""
    # timm knows its own repositories by their models' names
    name = base_model.removeprefix("timm/")
    if name != base_model and is_safe_name(name):
        return name
    # of safetensors alone
    if library == "transformers":
        return f"{HF}{base_model}"
    raise UsageError(
        f"{source} is for the weights in {base_model}: a file of somebody else may not choose where weights are loaded "
        "from; if you trust that repository, build its model and give it, ltmp.from_pretrained(source, model)"
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
    """Put thresholds into a repository of the Hugging Face Hub, with a card of all the thresholds there.

    The file is called thresholds-BUDGET.safetensors after the target it was learned for, so that one repository holds
    several, or thresholds-dial.safetensors where it has a dial; a repository that does not exist is made.

    Args:
        source: an attached model, or a file that `save` wrote.
        repo_id: USER/REPO.
        base_model: the repository of the model's own weights, e.g. timm/deit_small_patch16_224.fb_in1k.
        evaluation: what `evaluate` or `ltmp eval --json` measured, for the card and for the file.
        private: make the repository private, where it is made.
        revision: the branch to push to.
        token: instead of the one of `hf auth login`.
        message: of the commit.
        budget: what the dial is set to for those who load the file and ask for no budget; None leaves it as it is.
        metadata: more to keep in the file: `target`, `model_name`, `dataset`.

    Returns:
        The repository's address.

    Raises:
        LTMPError: not thresholds, no permission, or no network.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    known = {**metadata, **measured(evaluation), **({"base_model": base_model} if base_model else {})}
    known |= {} if budget is None else {"budget": budget}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "new.safetensors"
        if isinstance(source, nn.Module):
            save(source, path)
        annotate(path if isinstance(source, nn.Module) else locate(source, budget=budget), path, **known)
        added = read(path)
        file = file_name(added.metadata.get("target")) if added.dial is None else DIAL
        api = HfApi(token=token)
        with told(repo_id):
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            before = download(url.repo_id, [FILES, "README.md"], revision=revision, token=token)
            files = {**{p.name: read(p).metadata for p in before.glob(FILES)}, file: added.metadata}
            old = before / "README.md"
            text = card(url.repo_id, files, read_text(old, MAX_CARD) if old.exists() else None)
            operations = [CommitOperationAdd(file, path), CommitOperationAdd("README.md", text.encode())]
            api.create_commit(url.repo_id, operations, commit_message=message or f"Add {file}", revision=revision)
    return str(url)


def measured(evaluation: Evaluation | Mapping[str, Any] | None) -> dict[str, Any]:
    """The part of an evaluation that a thresholds file keeps; accuracies in percent."""
    if evaluation is None:
        return {}
    found: Mapping[str, Any] = asdict(evaluation) if is_dataclass(evaluation) else evaluation
    if not {"share", "images"} <= found.keys():
        raise LTMPError("this is no evaluation: expected what `ltmp eval --json FILE` writes")
    kept = {name: found.get(name) for name in ("images", "top1", "agreement", "share", "device")}
    kept |= {"top1_dense": found.get("dense_top1"), "speed": found.get("throughput")}
    return {name: value for name, value in kept.items() if value is not None}


def card(repo_id: str, files: Mapping[str, Mapping[str, Any]], before: str | None = None) -> str:
    """The model card of a repository: what its files say of themselves, and nothing else.

    Args:
        files: their metadata, by name.
        before: the card that is there; what people wrote into it stays.
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
    # a column that nobody filled says nothing
    filled = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return f"""Learned thresholds of token merging and pruning ([LTMP]({PAPER})):
two numbers a block with which a frozen vision transformer drops and merges tokens image by image. The model's own
weights are not in here and do not change.

{tables.markdown([{name: row[name] for name in filled} for row in rows])}
Budget and share are parts of the dense model's FLOPs: the one aimed at, and the one measured, as a mean over images.
Accuracies are in percent. Where a field is empty nothing was measured.

{_certified(files)}{_usage(repo_id, files)}
"""


def _certified(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The guarantee of each file, a line each, and how to use it."""
    found = {name: Certificate.from_dict(about["certificate"], name) for name, about in sorted(files.items())
             if about.get("certificate")}  # fmt: skip
    if not found:
        return ""
    lines = [f"- `{name}`, {certificate.sentence()}." for name, certificate in found.items()]
    return "\n".join(["Certified (`certified=True` sets that budget):", "", *lines, "", ""])


def _usage(repo_id: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """How to load one of them; where nothing says which weights they are for, with the reader's own model."""
    name, about = next(iter(sorted(files.items())))
    arguments = [f'"{repo_id}"']
    if not about.get("base_model"):
        arguments.append("model")
    dial = about.get("dial")
    chosen = about.get("target") if dial is None else _default(about)
    if chosen is not None and (len(files) > 1 or dial is not None):
        arguments.append(f"budget={chosen:g}")
    own = "" if about.get("base_model") else "# model: the one that they were learned on\n"
    turn = "" if dial is None else f"model.ltmp.set_budget({dial[0]:g})  # later, in microseconds\n"
    return f"""```python
import ltmp

{own}model = ltmp.from_pretrained({", ".join(arguments)})
{turn}```

On the command line they are called `--thresholds {PREFIX}{repo_id}/{name}`."""


def _default(about: Mapping[str, Any]) -> float:
    """A budget of a dial to name: the one that it was saved at, or its middle."""
    return float(about.get("budget") or round(sum(about["dial"]) / 2, 2))


def _budget(about: Mapping[str, Any]) -> object:
    """The budget of a file, or its dial's range."""
    dial = about.get("dial")
    return about.get("target") if dial is None else f"{dial[0]:g} to {dial[1]:g}"


def _row(name: str, about: Mapping[str, Any]) -> dict[str, object]:
    """The description of one file."""
    said = about.get("speed")
    speed = said if isinstance(said, Mapping) else {}
    where = about.get("device")
    return {
        "file": name,
        "model": about.get("model_name") or about.get("architecture"),
        "input": "x".join(map(str, about.get("input_size") or ())) or None,
        "budget": _budget(about),
        "set to": about.get("budget"),
        "share": about.get("share"),
        "top-1": about.get("top1"),
        "dense top-1": about.get("top1_dense"),
        "agree": about.get("agreement"),
        "images": about.get("images"),
        "speed-up": speed.get("speedup"),
        "img/s": speed.get("reduced"),
        "dense img/s": speed.get("dense"),
        "timed": f"batch {speed.get('batch_size')}{f', {where}' if where else ''}" if speed else None,
    }
