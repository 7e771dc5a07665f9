"""`ltmp eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ..extras import RUNTIMES, require
from ..options import (
    RUN,
    EvaluationOptions,
    FormOptions,
    ReducedModel,
    RequiredData,
    SpeedOptions,
    TableOptions,
    option,
    verb,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ...evaluate import Evaluation


@dataclass(frozen=True, kw_only=True)
class EngineOptions(FormOptions):
    """The engine, or the runtime of an export."""

    engine: Annotated[
        str | None,
        option(
            "Engine: auto, packed, triton or graph (default: the one in the thresholds file); or onnx or openvino, "
            "which compare a reduced with a dense export.",
            RUN,
        ),
    ] = None
    exported: Annotated[
        Path | None,
        option(
            "With --engine onnx or openvino: a file written by `ltmp export`; default: export now in the form of "
            "--form.",
            RUN,
        ),
    ] = None

    @property
    def runtime(self) -> str | None:
        """The runtime for exported files, if --engine names one."""
        return self.engine if self.engine in RUNTIMES else None

    def check_certified(self, budget: SpeedOptions) -> None:
        """Refuse --certified with an INT8 export: a certificate is for one precision."""
        if budget.certified and self.runtime and self.int8:
            raise UsageError("--certified is for the precision that was certified, which INT8 is not: leave out --int8")

    def check(self, run: EvaluationOptions, timed: bool) -> None:
        """Refuse what a runtime does not support; `timed` is whether the budget has to meet a time or a speed."""
        if self.exported and not self.runtime:
            raise UsageError("--exported is for --engine onnx or openvino, which run such files")
        if self.runtime and (run.amp or run.device not in ("auto", "cpu")):
            raise UsageError(
                f"--engine {self.engine} runs float32 or INT8 on the CPU: leave out --amp and --device {run.device}"
            )
        if self.runtime:
            require("onnxscript", RUNTIMES[self.runtime][1])
        if self.runtime and timed:
            raise UsageError(
                f"--engine {self.engine} is not timed block by block: give --budget instead of a time or a speed"
            )


@verb
def eval_verb(
    data: RequiredData,
    model: ReducedModel,
    speed: SpeedOptions,
    engine: EngineOptions,
    run: EvaluationOptions,
    output: TableOptions,
) -> None:
    """Compare the reduced model with the dense one: accuracy, agreement, FLOPs share, tokens and speed.

    Agreement is the percentage of images for which both give the same answer; the FLOPs share is 1 for the dense model.

    Example: ltmp eval --data imagenet/ --thresholds runs/deit/thresholds.safetensors --pretrained
    """
    from ... import distributed, load
    from ..runs import evaluate_with_bar, report_skipped
    from ..screen import suggest
    from ..timing import Target

    target, budget = Target.from_options(speed), speed.budget
    engine.check(run, timed=target is not None)
    name = model.name(budget)
    network = model.build(name, budget=budget)
    engine.check_certified(speed)
    budget = speed.resolve_budget(network, model.thresholds, run.amp_dtype, budget)
    load(network, model.thresholds, engine=None if engine.runtime else engine.engine, budget=budget)
    loader = data.open(data.data, network, split=data.split or "validation", limit=run.limit)
    device = run.torch_device
    if target:
        images = next(iter(loader))[0].to(device)
        budget = target.meet(network.to(device), images, run.amp_dtype, quiet=output.quiet)
    if engine.runtime:
        device, network = _in_runtime(network, engine)
    with distributed.group(device):
        result = evaluate_with_bar(network, loader, device=device, amp=run.amp_dtype, limit=run.limit, speed=run.speed)
        if distributed.rank() > 0:
            return
    report_skipped(loader.skipped)
    metadata: dict[str, Any] = {"model": name, "thresholds": str(model.thresholds), "device": str(device)}
    if budget is not None:
        metadata["budget"] = budget
    _report(result, metadata, timed=target is not None, output=output)
    if not output.quiet:
        suggest(*model.deploy_command(model.thresholds, budget=budget))


def _report(result: Evaluation, metadata: dict[str, Any], *, timed: bool, output: TableOptions) -> None:
    """Print the results, and write them as JSON and CSV."""
    from ...evaluate import tables
    from ..screen import print_result
    from ..timing import print_measured

    rows = tables.comparison(result)
    if not output.quiet:
        budget = f" at budget {metadata['budget']:g}" if "budget" in metadata else ""
        title = f"{metadata['model']}{budget}, {result.images} images (top-1, top-5 and agreement in %)"
        tables.show(rows, title)
        print_result(tables.tokens_line(result))
        if timed and result.throughput is not None:
            print_measured(result.throughput.batch_size, result.throughput.reduced)
    if output.json:
        tables.write_json(tables.as_json(result, **metadata), output.json)
    if output.csv:
        tables.write_csv(rows, output.csv)


def _in_runtime(network: nn.Module, options: EngineOptions) -> tuple[torch.device, nn.Module]:
    """Return the device of the runtime, and `network` in that runtime; what no file holds is exported now."""
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
