"""The predictor scores shards and writes the results; it is built where it runs, in this process or in a Ray actor."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import class_names
from ..data.workers import LostWorkerError, detect_lost_workers
from ..deploy import Deployment
from ..errors import LTMPError, UsageError
from ..hosts.outputs import embeddings_of
from .reading import Batch, End, Unreadable, default_workers, read_batches
from .shards import Shard
from .writer import Columns, Written, finished, write_shard

ATTEMPTS = 3
"""How often a Ray actor tries to score shards whose decoding processes are killed."""

OnBatch = Callable[[int, float], None]
"""Called with the number of images in a batch, broken ones included, and the share of their shard that is done."""


@dataclass(frozen=True)
class Scoring:
    """How to score images. Picklable, so that a predictor can be built from it in any process.

    Args:
        build: builds the model, with or without thresholds attached; a module-level function or a partial of one.
        top: number of classes to keep per image; None keeps five, or all if the model has fewer.
        embeddings: keep the input of the classifier instead of classes.
        class_names: names of the model's outputs, in order; None uses the names that come with the weights, if any.
        pretrained: whether the weights are timm's own, for which timm has the names of ImageNet's classes.
        transform: options of `eval_transform`.
        batch_size: images per batch; a batch never mixes shards.
        workers: processes that decode images ahead; None chooses a number that suits the device.
        device: where to run the model.
        amp: run under bfloat16 autocast.
        about: what else identifies the model, in JSON types: its name and arguments. A run is continued only if they
            are the same.
    """

    build: Callable[[], nn.Module]
    top: int | None = None
    embeddings: bool = False
    class_names: tuple[str, ...] | None = None
    pretrained: bool = False
    transform: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 64
    workers: int | None = None
    device: str = "cpu"
    amp: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


class Predictor:
    """Scores shards and writes each as one file; called on a batch of Ray Data, it scores the shards in that batch.

    >>> predictor = Predictor(Scoring(partial(timm.create_model, "vit_tiny_patch16_224", pretrained=True)), "out")
    >>> for written in predictor.score(find_shards(["images/"])):
    ...     print(written.images)
    """

    def __init__(self, scoring: Scoring, out: str | Path) -> None:
        """Build the model and call it on a blank image, so that errors are raised before anything is written.

        Raises:
            UsageError: `top` is more than the model's number of classes, or the model has no classifier, or no
                embeddings.
            LTMPError: the model cannot be built.
        """
        self.scoring = scoring
        self.out = Path(out)
        model = scoring.build()
        self.deployment = Deployment(
            model,
            options=scoring.transform,
            device=scoring.device,
            amp=torch.bfloat16 if scoring.amp else None,
            names=scoring.class_names or class_names(model, pretrained=scoring.pretrained),
        )
        if scoring.embeddings:
            if not hasattr(model, "forward_head"):
                raise UsageError(
                    f"{type(model).__name__} has no forward_head, which computes embeddings: use a timm model"
                )
            self.scores(self.deployment.blank[None])
            return
        if getattr(model, "num_classes", None) == 0:
            raise UsageError("the model has no classifier: give weights that have one, or --embeddings")
        classes = self.deployment.classes
        self.top = min(5, classes) if scoring.top is None else scoring.top
        if not 1 <= self.top <= classes:
            raise UsageError(f"top is {self.top}: expected 1 to {classes}, the model's number of classes")

    @torch.inference_mode()
    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Score images [B, C, H, W]; waits for the device only if the engine needs to.

        Returns:
            Columns as tensors on the device: `embedding` [B, C], or `classes` and `probabilities` [B, k]; `share` [B],
            the image's FLOPs share; and, if thresholds are attached, `tokens` [B], the image's tokens after the last
            block.
        """
        output = self.deployment(images, self._embed if self.scoring.embeddings else None)
        values = {"share": output.share}
        if output.kept is not None:
            values["tokens"] = output.kept[:, -1].int()
        if self.scoring.embeddings:
            return {"embedding": output.logits, **values}
        probabilities, classes = output.logits.softmax(-1).topk(self.top)
        return {"classes": classes.int(), "probabilities": probabilities, **values}

    def _embed(self, images: Tensor) -> Tensor:
        """Return the input of the classifier, [B, C]."""
        return embeddings_of(self.deployment.model, images).float()

    def score(self, shards: Iterable[Shard], on_batch: OnBatch | None = None) -> Iterator[Written]:
        """Score the shards in order and write each one when it is done, while the next images are being decoded.

        Raises:
            LTMPError: a file cannot be written, the model's output is NaN or infinite, or a decoding process was
                killed.
        """
        with detect_lost_workers():
            yield from self._score(shards, on_batch)

    def _score(self, shards: Iterable[Shard], on_batch: OnBatch | None) -> Iterator[Written]:
        workers, device = self.scoring.workers, self.deployment.device
        entries = read_batches(
            shards,
            self.deployment.transform,
            mode=self.deployment.mode,
            batch_size=self.scoring.batch_size,
            workers=default_workers(device) if workers is None else workers,
            pin_memory=device.type == "cuda",
        )
        results = _Results()
        for entry in entries:
            if isinstance(entry, End):
                yield self._write(entry.shard, results)
                results = _Results()
                continue
            results.add(entry, self.scores(entry.images) if entry.rows else None)
            if on_batch:
                on_batch(len(entry.rows) + len(entry.broken), entry.position)

    def _write(self, shard: Shard, results: _Results) -> Written:
        return write_shard(
            self.out,
            shard,
            results.columns(shard),
            results.broken,
            embeddings=self.scoring.embeddings,
            class_names=self.deployment.names,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the pickled shards in column `shard`; return the fields of `Written`, one row per shard.

        Finished shards are not scored again, so that a retry after a lost actor costs little. Lost decoding processes
        are retried here, as Ray does not notice them.
        """
        shards = [pickle.loads(shard) for shard in batch["shard"]]
        for attempt in reversed(range(ATTEMPTS)):
            try:
                for _ in self.score([shard for shard in shards if finished(self.out, shard) is None]):
                    pass
                break
            except LostWorkerError:
                if not attempt:
                    raise
        rows = [asdict(written) for shard in shards if (written := finished(self.out, shard))]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@dataclass
class _Results:
    """Results of one shard so far; tensors stay on the device until the shard is complete."""

    keys: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    broken: list[Unreadable] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, scores: dict[str, Tensor] | None) -> None:
        self.keys += batch.keys
        self.rows += batch.rows
        self.broken += batch.broken
        for name, values in (scores or {}).items():
            self.values.setdefault(name, []).append(values)

    def columns(self, shard: Shard) -> Columns:
        """Return all columns as `write_shard` takes them.

        Raises:
            LTMPError: a value is NaN or infinite.
        """
        values = {name: torch.cat(parts).cpu().numpy() for name, parts in self.values.items()}
        if not all(np.isfinite(column).all() for column in values.values()):
            raise LTMPError(f"the model's output is NaN or infinite in {shard.source}: repair its weights first")
        return {"key": self.keys, "row": self.rows, **values}
