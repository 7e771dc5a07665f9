"""`ltmp eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ..extras import RUNTIMES, need
from ..options import (
    RUN,
    EvaluationOptions,
    FormOptions,
    GivenData,
    ReducedModel,
    SpeedOptions,
    TableOptions,
    option,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class EngineOptions(FormOptions):
    """Options for the runtime of the reduced model."""

    engine: Annotated[
        str | None,
        option(
            "auto, packed, triton or graph (default: as learned); onnx or openvino: exported, against a dense export.",
            RUN,
        ),
    ] = None
    exported: Annotated[
        Path | None,
        option(
            "With --engine onnx or openvino: the file that `ltmp export` wrote; default: export now, as --form says.",
            RUN,
        ),
    ] = None

    @property
    def runtime(self) -> str | None:
        """The runtime of exported files, where one is asked for."""
        return self.engine if self.engine in RUNTIMES else None

    def check_certified(self, budget: SpeedOptions) -> None:
        """Refuse a certificate of other numbers than the runtime computes in."""
        if budget.certified and self.runtime and self.int8:
            raise UsageError("--certified is for the precision that was certified, which INT8 is not: leave out --int8")

    def check(self, run: EvaluationOptions, timed: bool) -> None:
        """Refuse what a runtime cannot do."""
        if self.exported and not self.runtime:
            raise UsageError("--exported is for --engine onnx or openvino, which run such files")
        if self.runtime and (run.amp or run.device not in ("auto", "cpu")):
            raise UsageError(
                f"--engine {self.engine} runs float32 or INT8 on the CPU: leave out --amp and --device {run.device}"
            )
        if self.runtime:
            need("onnxscript", RUNTIMES[self.runtime][1])
        if self.runtime and timed:
            raise UsageError(
                f"--engine {self.engine} is not timed block by block: give --budget instead of a time or a speed"
            )


@verb
def eval_verb(
    data: GivenData,
    model: ReducedModel,
    budget: SpeedOptions,
    engine: EngineOptions,
    run: EvaluationOptions,
    output: TableOptions,
) -> None:
    """Compare the reduced model with the dense one: accuracy, agreement, FLOPs share, tokens and speed.

    Example: ltmp eval --data imagenet/ --thresholds runs/deit/thresholds.safetensors --pretrained
    """
    from ... import distributed, load
    from ..runs import evaluate_with_bar, report_skipped
    from ..screen import suggest
    from ..timing import Target

    target = Target.of(budget)
    engine.check(run, timed=target is not None)
    name, share = model.name(budget.budget), budget.budget
    network = model.build(name, budget=share)
    engine.check_certified(budget)
    share = budget.share(network, model.thresholds, run.cast, share)
    load(network, model.thresholds, engine=None if engine.runtime else engine.engine, budget=share)
    loader = data.open(data.data, network, split=data.split or "validation", limit=run.limit)
    place = run.place
    if target:
        share = target.meet(network.to(place), next(iter(loader))[0].to(place), run.cast, quiet=output.quiet)
    if engine.runtime:
        place, network = _in_runtime(network, engine)
    with distributed.group(place):
        result = evaluate_with_bar(network, loader, device=place, amp=run.cast, limit=run.limit, speed=run.speed)
        if distributed.rank() > 0:
            return
    report_skipped(loader.skipped)
    about: dict[str, Any] = {"model": name, "thresholds": str(model.thresholds), "device": str(place)}
    _write(result, about | ({} if share is None else {"budget": share}), timed=target is not None, output=output)
    if not output.quiet:
        suggest(*model.deploy(model.thresholds, budget=share))


def _write(result: Any, about: dict[str, Any], *, timed: bool, output: TableOptions) -> None:
    from ...evaluate import tables
    from ..screen import say
    from ..timing import say_measured

    rows = tables.comparison(result)
    if not output.quiet:
        at = f" at {about['budget']:g}" if "budget" in about else ""
        tables.show(rows, f"{about['model']}{at}, {result.images} images (top-1, top-5, agree in %)")
        say(tables.tokens_line(result))
        if timed and result.throughput is not None:
            say_measured(result.throughput.batch_size, result.throughput.reduced)
    if output.json:
        tables.write_json(tables.as_json(result, **about), output.json)
    if output.csv:
        tables.write_csv(rows, output.csv)


def _in_runtime(network: nn.Module, options: EngineOptions) -> tuple[torch.device, nn.Module]:
    """Where exports run, and those of `network`, with a bar while what is missing is exported."""
    import torch

    from ...export import Plan, in_runtime
    from ..progress import progress_bar

    plan = Plan(form=options.form, int8=options.int8)
    with progress_bar("exporting", 1) as bar:
        sessions = in_runtime(
            network, options.runtime or "", options.exported, plan, progress=lambda stage: bar(0, stage)
        )
        bar(1, "exported")
    return torch.device("cpu"), sessions
