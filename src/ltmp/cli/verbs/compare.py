"""`ltmp compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ...files import check_writable
from ...ranges import BUDGET, CALIBRATION, SEED, VIEWS
from ..extras import need
from ..options import (
    AgainstOptions,
    CertifiedOption,
    Engine,
    EvaluationOptions,
    GivenData,
    NamedModel,
    config_of,
    option,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ...data import Loader
    from ...evaluate import Evaluation
    from ...evaluate.baselines import Baseline
    from ...evaluate.compare import Entry, Wanted


CURVE = (0.8, 0.6, 0.47)
"""Budgets where nobody names any: one would be a point, and no curve."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(CertifiedOption, AgainstOptions):
    """Options for the methods that are compared, and for those learned here."""

    method: Annotated[
        list[str] | None,
        option(
            "ltmp, ltpm, ltm, ltp, m, p, mp, pm, topk, evit, random; m:16 at that rate; resize:168, the dense model at "
            "so many pixels. May be repeated."
        ),
    ] = None
    budget: Annotated[
        list[float] | None,
        option(
            "FLOPs share that methods without a rate, and files with a dial, are to meet; may be repeated. "
            f"Default: {', '.join(map(str, CURVE))}, and of a file what it was saved at.",
            within=BUDGET,
        ),
    ] = None
    thresholds: Annotated[
        list[Path] | None, option("A file of learned thresholds that takes part; may be repeated.")
    ] = None
    learn_data: Annotated[str | None, option("Images that ltmp, ltpm, ltm and ltp learn on, not those of --data.")] = (
        None
    )
    views: Annotated[int, option("Images to look at while optimising thresholds; 0: calibrate only.", within=VIEWS)] = 0
    calibration: Annotated[int, option("Images to calibrate thresholds on.", within=CALIBRATION)] = 256
    seed: Annotated[int, option("Seed of the order of images to learn from.", within=SEED)] = 0

    def wanted(self) -> list[Wanted]:
        """The methods, each once."""
        from ...evaluate.compare import Wanted

        default = () if self.thresholds else ("ltmp", "m")
        found = [Wanted.parse(text) for text in dict.fromkeys(self.method or default)]
        learned = any(method.learned for method in found)
        if self.learn_data is None and learned:
            raise UsageError("learned methods need images to learn on: give --learn-data, or files as --thresholds")
        if self.learn_data is not None and not learned:
            raise UsageError("--learn-data is for methods that are learned here: add --method ltmp, or leave it out")
        return found


@dataclass(frozen=True, kw_only=True)
class CompareRun(EvaluationOptions):
    """How it runs, and where results go."""

    engine: Engine = None
    out: Annotated[Path, option("Folder of compare.csv, compare.json and compare.png.", writes=check_writable)] = Path(
        "compare"
    )


@verb
def compare_verb(data: GivenData, model: NamedModel, options: CompareOptions, run: CompareRun) -> None:
    """Compare token-reduction methods at several budgets on one model and data set: a table and a plot.

    All run on the same engine, beside the same model at lower resolution (--method resize:168) and a smaller one
    (--against MODEL), both dense. Learned thresholds come from --thresholds files or are made here from --learn-data;
    methods with fixed rates take the rate whose FLOPs share is closest to each budget.

    Example: ltmp compare --data imagenet/val --model deit_small_patch16_224 --pretrained --method ltmp --method m
    --method topk --budget 0.6 --budget 0.5 --learn-data imagenet/train
    """
    from ... import attach
    from ...evaluate import compare as job
    from ..progress import progress_bar
    from ..screen import suggest

    need("matplotlib")
    wanted = options.wanted()
    network = model.build(model.model).to(run.place)
    loader = data.open(data.data, network, split=data.split or "validation", limit=run.limit)
    attach(network, config_of(engine=run.engine))
    few = next(iter(loader))[0][:1].to(run.place)
    made = [method for method in wanted if not method.resized]
    entries: list[Entry | Baseline] = [
        *_from_files(network, options, run.engine, run.cast),
        *_made(network, made, options, data, run, few),
    ]
    attach(network, config_of(engine=run.engine))
    sizes = [int(method.r or 0) for method in wanted if method.resized]
    entries += options.baselines(network, few, sizes, pretrained=model.pretrained)
    with progress_bar("comparing", min(run.limit or loader.images, loader.images)) as advance:
        results = job.compare(
            network, loader, entries, device=run.place, amp=run.cast, limit=run.limit, speed=run.speed, progress=advance
        )
    _write(run.out, model.model, entries, results)
    source = options.learn_data or data.data
    suggest("ltmp", "dial", "--data", source, *model.again(None), "--scores", "best")


def _from_files(
    network: nn.Module, options: CompareOptions, engine: str | None, cast: torch.dtype | None
) -> Iterator[Entry]:
    files = options.thresholds or []
    budgets = options.shares(network, files, cast, options.budget) if files else ()
    for path in files:
        yield from _from_file(network, path, engine, budgets)


def _from_file(network: nn.Module, path: Path, engine: str | None, budgets: Sequence[float]) -> Iterator[Entry]:
    """A file's thresholds: with a dial at each budget that is asked for, or as they were saved."""
    from ... import LTMPConfig, attach
    from ...checkpoint import apply, read
    from ...evaluate.compare import Entry
    from ...hosts.attach import attachment

    saved = read(path)
    name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
    settings = {"engine": engine} if engine else {}
    dialled = budgets if saved.dial is not None else ()
    for budget in dialled or (None,):
        file = saved if budget is None else saved.at(budget, source=str(path))
        attach(network, LTMPConfig.from_dict({**file.config.to_dict(), **settings}))
        apply(network, file, source=str(path))
        target = file.metadata.get("target") if budget is None else budget
        yield Entry(
            name if budget is None else f"{name} {budget:g}", file.config.variant, target, attachment(network).policy
        )


def _made(
    network: nn.Module, wanted: list[Wanted], options: CompareOptions, data: GivenData, run: CompareRun, few: Tensor
) -> Iterator[Entry]:
    """Each method at each budget: learned here, or with the rate that meets it."""
    from ...evaluate.compare import fixed_entry

    budgets = options.budget or CURVE
    for method in wanted:
        if not method.learned:
            for target in [None] if method.r is not None else budgets:
                yield fixed_entry(network, method, few, target)
            continue
        source = options.learn_data or ""
        loader = data.open(source, network, split="train", shuffle=True, seed=options.seed)
        for target in budgets:
            yield _learned(network, method.variant, target, loader, options, run)


def _learned(
    network: nn.Module, variant: str, target: float, loader: Loader, options: CompareOptions, run: CompareRun
) -> Entry:
    from ... import attach
    from ...evaluate.compare import Entry
    from ...hosts.attach import thresholds_of
    from ...learning import learn
    from ..progress import progress_bar

    attach(network, config_of(variant=variant, engine=run.engine))
    with progress_bar(f"learning {variant} at {target:g}", None) as bar:
        learn(
            network, loader, target, distill=not getattr(loader.dataset, "labelled", True), views=options.views,
            calibration=options.calibration, seed=options.seed, amp=run.cast, progress=bar.reach,
        )  # fmt: skip
    return Entry(f"{variant} {target:g}", variant, target, thresholds_of(network))


def _write(out: Path, model: str, entries: list[Entry | Baseline], results: dict[str, Evaluation]) -> None:
    import torch

    from ...evaluate import compare as job
    from ...evaluate import tables
    from ...visualize.curves import plot_methods
    from ..screen import say

    rows = job.rows(entries, results)
    images = next(iter(results.values())).images
    tables.show([{new: row[old] for old, new in COLUMNS.items()} for row in rows], f"{model}, {images} images")
    out.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"model": model, "threads": torch.get_num_threads()}
    tables.write_json(job.as_json(entries, results, **about), out / "compare.json")
    tables.write_csv(rows, out / "compare.csv")
    plot_methods(rows, out / "compare.png", title=model)
    say(f"table and plot: {out}/compare.csv, compare.json, compare.png")


COLUMNS = {
    "name": "method",
    "share": "share",
    "ideal": "ideal",
    "top1": "top-1",
    "top5": "top-5",
    "agreement": "agree",
    "images_per_second": "img/s",
    "speedup": "speed-up",
}
"""Of the table: names of a row's values, and how they are headed."""
