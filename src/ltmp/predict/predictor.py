"""The predictor: built where it works (in this process or in a Ray actor), it scores shards and writes them."""

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
from ..data.workers import LostWorkerError, naming_lost_workers
from ..deploy import Deployment
from ..errors import LTMPError, UsageError
from ..hosts.outputs import embeddings_of
from .reading import Batch, End, Unreadable, default_workers, read_batches
from .shards import Shard
from .writer import Columns, Written, finished, write_shard

ATTEMPTS = 3
"""Times that an actor scores a shard whose decoding processes are killed."""

OnBatch = Callable[[int, float], None]
"""Called with the number of images just read, broken ones counted, and the share of their shard that is done."""


@dataclass(frozen=True)
class Scoring:
    """How images are scored. Picklable: a predictor is made of it wherever the work is done.

    Args:
        build: makes the model, with thresholds attached or without; a module-level function or a partial of one.
        top: classes to keep for each image; None keeps five, or all where there are fewer.
        embeddings: keep what enters the classifier instead of classes.
        class_names: names of the model's outputs, in order; None takes those that came with the weights, if they did.
        pretrained: whether the weights are timm's own, for which timm knows the names of ImageNet's classes.
        transform: options of `eval_transform`.
        batch_size: images a batch; a batch never mixes shards.
        workers: processes that decode ahead; None suits the device.
        device: where the model runs.
        amp: compute in bfloat16 where autocast does.
        about: what else makes this model what it is, in JSON types: its name and arguments. A run goes on only with
            the same.
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


@dataclass
class Scored:
    """Results so far of one shard; numbers stay on the device until it is complete."""

    keys: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    broken: list[Unreadable] = field(default_factory=list)
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, batch: Batch, scores: dict[str, Tensor] | None) -> None:
        self.keys += batch.keys
        self.rows += batch.rows
        self.broken += batch.broken
        for name, numbers in (scores or {}).items():
            self.values.setdefault(name, []).append(numbers)

    def columns(self, shard: Shard) -> Columns:
        """Every column as it is written.

        Raises:
            LTMPError: NaN or infinity among the numbers.
        """
        values = {name: torch.cat(parts).cpu().numpy() for name, parts in self.values.items()}
        if not all(np.isfinite(numbers).all() for numbers in values.values()):
            raise LTMPError(f"the model's output is NaN or infinite in {shard.source}: repair its weights first")
        return {"key": self.keys, "row": self.rows, **values}


class Predictor:
    """Scores whole shards and writes each as one file; a call does so for a batch of Ray Data.

    >>> predictor = Predictor(Scoring(partial(timm.create_model, "vit_tiny_patch16_224", pretrained=True)), "out")
    >>> for written in predictor.score(find_shards(["images/"])):
    ...     print(written.images)
    """

    def __init__(self, scoring: Scoring, out: str | Path) -> None:
        """Build the model, and call it on a blank image: what cannot work is said before anything is written.

        Raises:
            UsageError: more classes are asked for than the model has, or it has none, or no embeddings.
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
                    f"{type(model).__name__} has no forward_head, where embeddings are taken: use a timm model"
                )
            self.scores(self.deployment.blank[None])
            return
        if getattr(model, "num_classes", None) == 0:
            raise UsageError("the model has no classifier: give weights that have one, or --embeddings")
        outputs = self.deployment.classes
        self.top = min(5, outputs) if scoring.top is None else scoring.top
        if not 1 <= self.top <= outputs:
            raise UsageError(f"top is {self.top}: expected 1 to {outputs}, the model's number of classes")

    @torch.inference_mode()
    def scores(self, images: Tensor) -> dict[str, Tensor]:
        """Score images [B, C, H, W]; nothing here waits for the device but what the engine needs.

        Returns:
            Column name to numbers, on the device: `embedding` [B, C], or `classes` and `probabilities` [B, k]; `share`
            [B], the image's FLOPs share, and `tokens` [B], those it ends with, where thresholds are attached.
        """
        found = self.deployment(images, self._embed if self.scoring.embeddings else None)
        values = {"share": found.share}
        if found.kept is not None:
            values["tokens"] = found.kept[:, -1].int()
        if self.scoring.embeddings:
            return {"embedding": found.logits, **values}
        probabilities, classes = found.logits.softmax(-1).topk(self.top)
        return {"classes": classes.int(), "probabilities": probabilities, **values}

    def _embed(self, images: Tensor) -> Tensor:
        """[B, C], what enters the classifier."""
        return embeddings_of(self.deployment.model, images).float()

    def score(self, shards: Iterable[Shard], on_batch: OnBatch | None = None) -> Iterator[Written]:
        """Score the shards in order and write each when it is done, while the images of the next are being decoded.

        Raises:
            LTMPError: a file cannot be written, the model gives NaN, or a process that decodes was killed.
        """
        with naming_lost_workers():
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
        scored = Scored()
        for entry in entries:
            if isinstance(entry, End):
                yield self._write(entry.shard, scored)
                scored = Scored()
                continue
            scored.add(entry, self.scores(entry.images) if entry.rows else None)
            if on_batch:
                on_batch(len(entry.rows) + len(entry.broken), entry.position)

    def _write(self, shard: Shard, scored: Scored) -> Written:
        columns = scored.columns(shard)
        return write_shard(
            self.out,
            shard,
            columns,
            scored.broken,
            embeddings=self.scoring.embeddings,
            class_names=self.deployment.names,
        )

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Score the pickled shards in column `shard`; gives what was written, a row each.

        A shard that is there is not scored again, so that a retry after a lost actor costs little. Processes that
        decode may be lost, too; Ray knows nothing of those.
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
