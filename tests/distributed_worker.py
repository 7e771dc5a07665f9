"""What each rank of tests/test_distributed.py does, and what one process is compared by; started by torchrun.

    torchrun --standalone --nproc-per-node 2 tests/distributed_worker.py FOLDER

writes FOLDER/RANK.pt.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import ltmp
from helpers import random_images, tiny_vit
from ltmp import distributed
from ltmp.data import Loader, make_loader
from ltmp.evaluate import ImageRows, evaluate
from ltmp.learning import Tuning

CLASSES = 64
TARGET = 0.65


def model_and_images(count: int) -> tuple[Any, TensorDataset]:
    """A model and `count` images, each with a label of its own."""
    model = ltmp.attach(tiny_vit(depth=4, num_classes=CLASSES))
    return model, TensorDataset(random_images(count), torch.arange(count) % CLASSES)


def learned(batch: int, **settings: Any) -> dict[str, Any]:
    """A learning run on shuffled images: the thresholds after every step and at the end, and its history."""
    model, images = model_and_images(60)
    trail = []
    result = ltmp.learn(
        model,
        make_loader(images, batch, shuffle=True, seed=3),
        TARGET,
        views=240,
        calibration=45,
        on_step=lambda step: trail.append(thresholds(model)),
        **settings,
    )
    return {
        "trail": torch.stack(trail),
        "end": thresholds(model),
        "history": torch.tensor([[step.loss, step.share] for step in result.history]),
        "share": result.share,
        "views": result.views,
    }


def thresholds(model: Any) -> torch.Tensor:
    return torch.cat([model.ltmp.merge.detach(), model.ltmp.prune.detach()]).clone()


def evaluated(
    count: int, batch: int, limit: int | None = None, plain: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """An evaluation, and the images that this process saw; `plain`: the loader is a list of batches."""
    model, images = model_and_images(count)
    model.ltmp.set([0.6] * 4, [0.04] * 4)
    loader: Any = make_loader(images, batch)
    seen: list[int] = []

    def look(rows: ImageRows) -> None:
        seen.extend(rows.label.tolist())

    result = evaluate(model, list(loader) if plain else loader, limit=limit, speed=False, on_images=look)
    return asdict(result), seen


EVALUATIONS: dict[str, dict[str, Any]] = {
    "an uneven last batch": {"count": 50, "batch": 8},
    "an odd number of batches": {"count": 20, "batch": 4},
    "fewer batches than ranks": {"count": 6, "batch": 8},
    "a limit": {"count": 50, "batch": 8, "limit": 29},
    "a list of batches": {"count": 30, "batch": 8, "plain": True},
    "a limited list of batches": {"count": 50, "batch": 8, "limit": 29, "plain": True},
}
LEARNING: dict[str, dict[str, Any]] = {
    "labels": {},
    "distilled": {"distill": True},
    "accumulated": {"accumulate": 2},
    "tuned": {"tuning": Tuning("lora", joint_every=1)},
}


def together() -> dict[str, Any]:
    """Everything that both ranks do."""
    rank = distributed.rank()
    value = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    mean = distributed.mean(value[: 1 + rank] ** 2)
    mean.backward()
    skipped = {f"{rank}.png": "broken"}
    distributed.merge(skipped)
    loader = Loader(TensorDataset(torch.arange(10), torch.arange(10)), 3, shuffle=True)
    ranks = distributed.world()
    return {
        "gathered": distributed.gather(torch.tensor([rank, rank + 1])),
        "total": distributed.total(torch.tensor([0.1 * (rank + 1)])),
        "mean": (mean.detach(), value.grad),
        "exchanged": distributed.exchange({"rank": rank}),
        "skipped": skipped,
        "stream": [images.tolist() for images, _ in loader.stream(6, 30, rank, ranks)],
        "learned": {name: learned(6, **settings) for name, settings in LEARNING.items()},
        "evaluated": {name: evaluated(**settings) for name, settings in EVALUATIONS.items()},
    }


def deserted() -> str:
    """What rank 0 is told when rank 1 does not come."""
    set_timeout = getattr(torch.distributed, "set_timeout", None) or torch.distributed.distributed_c10d._set_pg_timeout
    set_timeout(timedelta(seconds=1))
    if distributed.rank() == 1:
        time.sleep(4)
        return ""
    try:
        distributed.total(torch.zeros(1))
    except distributed.LostRankError as error:
        return str(error)
    return "nobody was missed"


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with distributed.group(torch.device("cpu")):
        found = {**together(), "deserted": deserted()}
        torch.save(found, folder / f"{distributed.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
