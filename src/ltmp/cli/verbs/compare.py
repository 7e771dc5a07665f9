"""`ltmp compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ...files import check_writable
from ...ranges import BUDGET, CALIBRATION, SEED, VIEWS
from ..extras import require
from ..options import (
    AgainstOptions,
    CertifiedOption,
    Engine,
    EvaluationOptions,
    NamedModel,
    RequiredData,
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
    from ...evaluate.compare import Entry, RequestedMethod

DEFAULT_BUDGETS = (0.8, 0.6, 0.47)
"""Several, so that the plot has a curve."""

HEADINGS = {
    "name": "method",
    "share": "share",
    "ideal": "ideal",
    "top1": "top-1",
    "top5": "top-5",
    "agreement": "agree",
    "images_per_second": "img/s",
    "speedup": "speed-up",
}
"""Columns of the table and their headings."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions(CertifiedOption, AgainstOptions):
    """The methods to compare, their budgets, and how thresholds are learned here."""

    method: Annotated[
        list[str] | None,
        option(
            "Method: ltmp, ltpm, ltm or ltp (learned); m, p, mp, pm, topk, evit or random (at the fixed rate that "
            "meets a budget, or at a given one: m:16); or resize:168 (the dense model at that image size). May be "
            "repeated. Default: ltmp and m, or none with --thresholds."
        ),
    ] = None
    budget: Annotated[
        list[float] | None,
        option(
            "FLOPs share that methods without a rate, and files with a dial, have to meet; may be repeated. Default: "
            f"{', '.join(map(str, DEFAULT_BUDGETS))}, or for a file the one it was saved at.",
            within=BUDGET,
        ),
    ] = None
    thresholds: Annotated[
        list[Path] | None, option("Thresholds file to include in the comparison; may be repeated.")
    ] = None
    learn_data: Annotated[
        str | None, option("Images for ltmp, ltpm, ltm and ltp to learn from, separate from those of --data.")
    ] = None
    views: Annotated[
        int,
        option(
            "Images to optimise thresholds on, counted each time an image is used; 0 only calibrates.", within=VIEWS
        ),
    ] = 0
    calibration: Annotated[int, option("Images to calibrate thresholds on.", within=CALIBRATION)] = 256
    seed: Annotated[int, option("Seed of the order of the images to learn from.", within=SEED)] = 0

    def methods(self) -> list[RequestedMethod]:
        """The methods of --method, each once.

        Raises:
            UsageError: a method is unknown, or --learn-data and learned methods are not given together.
        """
        from ...evaluate.compare import RequestedMethod

        default = () if self.thresholds else ("ltmp", "m")
        methods = [RequestedMethod.parse(text) for text in dict.fromkeys(self.method or default)]
        learned = any(method.learned for method in methods)
        if self.learn_data is None and learned:
            raise UsageError("learned methods need images to learn on: give --learn-data, or files as --thresholds")
        if self.learn_data is not None and not learned:
            raise UsageError("--learn-data is for methods that are learned here: add --method ltmp, or leave it out")
        return methods


@dataclass(frozen=True, kw_only=True)
class CompareRun(EvaluationOptions):
    """Engine, evaluation and the output folder."""

    engine: Engine = None
    out: Annotated[Path, option("Folder for compare.csv, compare.json and compare.png.", check_path=check_writable)] = (
        Path("compare")
    )


@verb
def compare_verb(data: RequiredData, model: NamedModel, options: CompareOptions, run: CompareRun) -> None:
    """Compare token-reduction methods at several budgets on one model and dataset, in a table and a plot.

    All methods run on the same engine. Dense baselines are the model at lower resolution (--method resize:168) and a
    smaller model (--against MODEL). Learned thresholds come from --thresholds files, or are learned now from
    --learn-data; methods with fixed rates use the rate whose FLOPs share is closest to each budget.

    Example: ltmp compare --data imagenet/val --model deit_small_patch16_224 --pretrained --method ltmp --method m
    --method topk --budget 0.6 --budget 0.5 --learn-data imagenet/train
    """
    from ... import attach
    from ...evaluate import compare as job
    from ..progress import progress_bar
    from ..screen import suggest

    require("matplotlib")
    methods = options.methods()
    network = model.build(model.model).to(run.torch_device)
    loader = data.open(data.data, network, split=data.split or "validation", limit=run.limit)
    attach(network, config_of(engine=run.engine))
    image = next(iter(loader))[0][:1].to(run.torch_device)
    reductions = [method for method in methods if not method.resized]
    entries: list[Entry | Baseline] = [
        *_entries_of_files(network, options, run.engine, run.amp_dtype),
        *_entries_of_methods(network, reductions, options, data, run, image),
    ]
    attach(network, config_of(engine=run.engine))
    sizes = [int(method.r or 0) for method in methods if method.resized]
    entries += options.baselines(network, image, sizes, pretrained=model.pretrained)
    with progress_bar("comparing", min(run.limit or loader.images, loader.images)) as advance:
        results = job.compare(
            network,
            loader,
            entries,
            device=run.torch_device,
            amp=run.amp_dtype,
            limit=run.limit,
            speed=run.speed,
            progress=advance,
        )
    _write(run.out, model.model, entries, results)
    source = options.learn_data or data.data
    suggest("ltmp", "dial", "--data", source, *model.arguments_for(None), "--scores", "best")


def _entries_of_files(
    network: nn.Module, options: CompareOptions, engine: str | None, autocast: torch.dtype | None
) -> Iterator[Entry]:
    files = options.thresholds or []
    budgets = options.resolve_budgets(network, files, autocast, options.budget) if files else ()
    for path in files:
        yield from _entries_of_file(network, path, engine, budgets)


def _entries_of_file(network: nn.Module, path: Path, engine: str | None, budgets: Sequence[float]) -> Iterator[Entry]:
    """The thresholds of a file: at each of the budgets if it has a dial, otherwise as they were saved."""
    from ... import LTMPConfig, attach
    from ...checkpoint import apply, read
    from ...evaluate.compare import Entry
    from ...hosts.attach import attachment

    saved = read(path)
    name = f"{path.parent.name}/{path.name}" if path.parent.name else path.name
    settings = {"engine": engine} if engine else {}
    dial_budgets = budgets if saved.dial is not None else ()
    for budget in dial_budgets or (None,):
        file = saved if budget is None else saved.at(budget, source=str(path))
        attach(network, LTMPConfig.from_dict({**file.config.to_dict(), **settings}))
        apply(network, file, source=str(path))
        target = file.metadata.get("target") if budget is None else budget
        yield Entry(
            name if budget is None else f"{name} {budget:g}", file.config.variant, target, attachment(network).policy
        )


def _entries_of_methods(
    network: nn.Module,
    methods: list[RequestedMethod],
    options: CompareOptions,
    data: RequiredData,
    run: CompareRun,
    image: Tensor,
) -> Iterator[Entry]:
    """Each method at each budget, with learned thresholds or with the fixed rate that meets it.

    Args:
        image: [1, C, H, W] on the network's device, to count FLOPs with.
    """
    from ...evaluate.compare import fixed_entry

    budgets = options.budget or DEFAULT_BUDGETS
    for method in methods:
        if not method.learned:
            for target in [None] if method.r is not None else budgets:
                yield fixed_entry(network, method, image, target)
            continue
        loader = data.open(options.learn_data or "", network, split="train", shuffle=True, seed=options.seed)
        for target in budgets:
            yield _learned_entry(network, method.variant, target, loader, options, run)


def _learned_entry(
    network: nn.Module, variant: str, target: float, loader: Loader, options: CompareOptions, run: CompareRun
) -> Entry:
    """Learn thresholds for one budget now."""
    from ... import attach
    from ...evaluate.compare import Entry
    from ...hosts.attach import thresholds_of
    from ...learning import learn
    from ..progress import progress_bar

    attach(network, config_of(variant=variant, engine=run.engine))
    with progress_bar(f"learning {variant} at {target:g}", None) as bar:
        learn(
            network, loader, target, distill=not getattr(loader.dataset, "labelled", True), views=options.views,
            calibration=options.calibration, seed=options.seed, amp=run.amp_dtype, progress=bar.reach,
        )  # fmt: skip
    return Entry(f"{variant} {target:g}", variant, target, thresholds_of(network))


def _write(out: Path, model: str, entries: list[Entry | Baseline], results: dict[str, Evaluation]) -> None:
    """Print the table, and write it as CSV and JSON with a plot."""
    import torch

    from ...evaluate import compare as job
    from ...evaluate import tables
    from ...visualize.curves import plot_methods
    from ..screen import print_result

    rows = job.rows(entries, results)
    images = next(iter(results.values())).images
    table = [{heading: row[column] for column, heading in HEADINGS.items()} for row in rows]
    tables.show(table, f"{model}, {images} images")
    out.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, Any] = {"model": model, "threads": torch.get_num_threads()}
    tables.write_json(job.as_json(entries, results, **metadata), out / "compare.json")
    tables.write_csv(rows, out / "compare.csv")
    plot_methods(rows, out / "compare.png", title=model)
    print_result(f"table and plot written to {out}/compare.csv, compare.json and compare.png")
