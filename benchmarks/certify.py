"""Coverage of certificates by simulation, and how far certified budgets are from the best possible ones.

    python benchmarks/certify.py --demo ltmp-demo --out certify-demo
    python benchmarks/certify.py --amp --model vit_small_patch14_dinov2 --img-size 224 --num-classes 200 \
        --weights vit.safetensors --thresholds dial.safetensors --val val.tar --out certify

Each image goes once through the dense model and through the model at every budget. The losses are kept in losses.npz,
so that a second run only simulates. A split certifies on n images and measures the risk on all others. A draw certifies
on n images drawn with replacement from all images, for which the risk that the certificate bounds is known exactly.
--demo uses the model that `ltmp demo` left in a folder, makes a dial on 500 digits, and evaluates on 3,000 others. With
--others, lower resolution and fixed-rate merging are certified as dials on the same images. Writes certify.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset

import ltmp
from ltmp.certification.resolution import lower_resolutions
from ltmp.certification.statistics import PValue, betting_p_value, binomial_tail
from ltmp.cli.progress import progress_bar
from ltmp.data import Loader, eval_transform, make_loader, open_dataset
from ltmp.data.embedded import load_digits
from ltmp.deploy import deployed
from ltmp.engines.body import running
from ltmp.evaluate import tables
from ltmp.evaluate.compare import rates_for
from ltmp.hosts.attach import attachment
from ltmp.zoo.build import build_model

LEVELS = (0.01, 0.02, 0.05)
SIZES = (300, 1000)
CONFIDENCE = 0.95

Way = tuple[str, float, nn.Module, Callable[[], Any]]
"""Name of the dial, FLOPs share, the model, and a function that returns the context to run the model in."""


def subject(options: argparse.Namespace) -> tuple[nn.Module, Loader]:
    """The model with a dial, and images that the dial was not learned from."""
    if options.demo:
        from ltmp.demo import Setup, trained_model

        model = trained_model(options.demo / "vit.safetensors", Setup(), 0, progress_bar)
        ltmp.attach(model)
        with progress_bar("dial", None) as bar:
            learning = make_loader(load_digits("learn"), 50, shuffle=True)
            ltmp.learn_dial(model, learning, options.low, options.high, views=0, progress=bar.reach)
        rest = load_digits("train", "val")
        return model, make_loader(Subset(rest, range(len(rest) - 3000, len(rest))), 100)
    model = build_model(
        options.model, weights=options.weights, num_classes=options.num_classes, image_size=options.img_size
    )
    ltmp.load(model, options.thresholds)
    transform = eval_transform(model, crop_pct=1.0, crop_mode="squash")
    data = open_dataset(str(options.val), split="validation", transform=transform)
    return model, make_loader(data, 64)


def ways(model: nn.Module, images: torch.Tensor, options: argparse.Namespace) -> list[Way]:
    """Every budget of every dial, the largest first."""
    attached = attachment(model)
    thresholds = attached.thresholds
    dial = thresholds.dial
    assert dial is not None
    grid = np.arange(0.95, 0.1, -options.step).round(4).tolist()
    shares = [share for share in grid if dial.lowest <= share <= dial.highest]

    def at(share: float) -> Any:
        thresholds.set_budget(share)
        return nullcontext()

    found: list[Way] = [("dial", share, model, lambda share=share: at(share)) for share in shares]
    if options.others:
        small = lower_resolutions(model, images)
        found += [("lower resolution", share, one, nullcontext) for share, one in small]
        for share in shares[:: options.others]:
            rates = rates_for(model, images[:1], "m", share)
            body = replace(attached.body, policy=rates)
            found.append(("fixed-rate merging", share, model, lambda body=body: running(body=body)))
    return found


def measure(model: nn.Module, loader: Loader, options: argparse.Namespace) -> dict[str, Any]:
    """Names and shares [K], whether predictions differ from dense and are correct [K, N], and for dense correct [N]."""
    device = torch.device(options.device)
    model.to(device)
    every = ways(model, next(iter(loader))[0].to(device), options)
    answers: list[list[torch.Tensor]] = [[] for _ in every]
    plain, labels = [], []
    with deployed(model, device, amp=torch.bfloat16 if options.amp else None), progress_bar("", loader.images) as bar:
        for _, _, one, _ in every:
            one.to(device).eval()
        for images, targets in loader:
            images = images.to(device)
            with ltmp.dense():
                plain.append(model(images).argmax(-1).cpu())
            labels.append(targets)
            for found, (_, _, one, inside) in zip(answers, every, strict=True):
                # recorded calls are always reduced, even if reduction does not pay off
                with inside(), ltmp.record():
                    found.append(one(images).argmax(-1).cpu())
            bar(len(images))
    dense, right = torch.cat(plain), torch.cat(labels)
    reduced = torch.stack([torch.cat(found) for found in answers])
    return {
        "name": np.array([name for name, *_ in every]), "share": np.array([share for _, share, *_ in every]),
        "differs": (reduced != dense).numpy(), "right": (reduced == right).numpy(), "dense": (dense == right).numpy(),
    }  # fmt: skip


def passes(losses: np.ndarray, level: float, exact: bool) -> int:
    """How many budgets are certified from losses [K, n]: they are tested in order, until one fails."""
    p_value: PValue = betting_p_value
    for k, row in enumerate(losses):
        p = binomial_tail(int(row.sum()), len(row), level) if exact else p_value(row, level, CONFIDENCE)
        if p > 1 - CONFIDENCE:
            return k
    return len(losses)


def simulate(losses: np.ndarray, shares: np.ndarray, n: int, level: float, exact: bool, turns: int) -> dict[str, Any]:
    """How often a certified budget exceeds the risk level, and how far it is from the best budget."""
    rng = np.random.default_rng(0)
    whole = losses.mean(1)
    broken_split = broken_draw = none = 0
    certified, best = [], []
    for _ in range(turns):
        order = rng.permutation(losses.shape[1])
        k = passes(losses[:, order[:n]], level, exact)
        others = losses[:, order[n:]].mean(1)
        broken_split += k > 0 and others[k - 1] > level
        none += k == 0
        certified.append(shares[k - 1] if k else 1.0)
        good = np.flatnonzero(others <= level)
        best.append(shares[good].min() if len(good) else 1.0)
        drawn = rng.integers(0, losses.shape[1], n)
        k = passes(losses[:, drawn], level, exact)
        broken_draw += k > 0 and whole[k - 1] > level
    return {
        "broken, splits %": 100 * broken_split / turns, "broken, draws %": 100 * broken_draw / turns,
        "certified": float(np.mean(certified)), "best": float(np.mean(best)), "none %": 100 * none / turns,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output folder of `ltmp demo`: use its model and digits")
    parser.add_argument("--model")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--thresholds", type=Path, help="file with a dial, not learned on the images of --val")
    parser.add_argument("--val", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--low", type=float, default=0.35, help="lowest share of the dial made for --demo")
    parser.add_argument("--high", type=float, default=0.95)
    parser.add_argument("--step", type=float, default=0.05, help="step between budgets")
    parser.add_argument(
        "--others", type=int, default=0, help="also lower resolutions, and fixed rates at every OTHERS-th budget"
    )
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "losses.npz"
    if not kept.exists():
        np.savez(kept, **measure(*subject(options), options))
    found = dict(np.load(kept))
    differs = found["differs"].astype(np.float64)
    dropped = found["dense"].astype(np.float64) - found["right"].astype(np.float64)
    rows = []
    for name in dict.fromkeys(found["name"].tolist()):
        mine = found["name"] == name
        for risk, losses, exact in (("disagree", differs, True), ("error", dropped, False)):
            for n in (n for n in SIZES if n < losses.shape[1]):
                for level in LEVELS:
                    row = simulate(losses[mine], found["share"][mine], n, level, exact, options.turns)
                    rows.append({"dial": name, "risk": risk, "n": n, "level %": 100 * level, **row})
        risks = ", ".join(
            f"{s:g}: {100 * r:.2f}" for s, r in zip(found["share"][mine], differs[mine].mean(1), strict=True)
        )
        print(f"{name}, disagreement in % on all {differs.shape[1]} images: {risks}")
    tables.show(rows, f"{options.turns} splits, {100 * CONFIDENCE:g} % confidence")
    tables.write_csv(rows, str(options.out / "certify.csv"))


if __name__ == "__main__":
    main()
