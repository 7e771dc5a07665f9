"""Images per second of every way to run a model, side by side in one process.

Each way is first checked against a float32 reference. A way whose decisions or logits are wrong gets no speed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calls import record
from ..engines import select, trial
from ..engines.body import running
from ..errors import LTMPError, UsageError, first_line
from ..hosts.attach import attachment, detach
from ..hosts.outputs import answers_in
from ..method.policy import Policy
from .agreement import DECISIONS, decisions_agree, entering, under
from .compare import rates_for
from .timing import Call, timed

FIXED = "fixed-rate merge"

SHARE = 0.005
"""Allowed difference from the packed engine's mean FLOPs share, for 64 images or more; fewer images average out less
and are allowed more.
"""

LOGITS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""Allowed distance of logits from the float32 reference, relative to its norm, on top of the packed engine's distance.

A single decision flipped by rounding changes the parity of every later token of its image. Half precision is therefore
judged by its decisions; this tolerance only catches logits that are broken, not merely rounded.
"""


@dataclass(frozen=True)
class Row:
    """Results for one way to run the model.

    Attributes:
        way: its name.
        images_per_second: median over the rounds, None if the check failed.
        share: mean FLOPs share of its images; 1 for dense.
        ideal: 1 / share.
        ratio: speed relative to the fastest dense way, None if either is missing.
        decisions: fraction of decisions equal to the reference's on the same inputs, None if they were not compared.
        logits: distance of its logits from float32, relative to their norm.
        note: why there is no speed.
    """

    way: str
    images_per_second: float | None
    share: float
    ideal: float
    ratio: float | None
    decisions: float | None
    logits: float
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with None for NaN, which JSON cannot represent."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Other:
    """A way to run a model supplied by the caller, whose logits are only checked to be finite.

    Attributes:
        way: its name.
        run: from prepared images to an output.
        share: its share of the dense FLOPs; None is the reduced model's share.
        prepared: untimed preparation of images [B, C, H, W].
    """

    way: str
    run: Callable[[Any], Any]
    share: float | None
    prepared: Callable[[Tensor], Any] = lambda images: images


class Bench:
    """Every way to run one attached model on one batch.

    Args:
        model: attached, in evaluation mode, on its device and in its dtype; left unchanged.
        images: [B, 3, H, W] of the same device and dtype.
        compiled: also try `torch.compile` for the dense model.
        baseline: compare with a fixed-rate merge at the same FLOPs share.
        others: further ways to time.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        compiled: bool = True,
        baseline: bool = True,
        others: Sequence[Other] = (),
    ) -> None:
        self.model, self.images, self.others = model, images, others
        self.body = attachment(model).body
        self.baseline = baseline
        self.dense = detach(copy.deepcopy(model))
        self.compiled = compiled
        self.fixed: Policy | None = None
        self.ways: dict[str, Call] = {}
        self.absent: dict[str, str] = {}
        self.rows: list[Row] = []

    def run(self, seconds: float = 2.0) -> list[Row]:
        """Check every way, then time those that pass, interleaved, each for roughly `seconds`."""
        self.check()
        return self.time(seconds)

    @torch.inference_mode()
    def check(self) -> list[Row]:
        """Run every way a few times, which also compiles it, and compare it with float32. The rows have no speed yet.

        Raises:
            LTMPError: the model is in train mode.
        """
        if self.model.training or self.body.policy.training:
            raise LTMPError("a model is timed as deployed: call model.eval() first")
        if self.images.is_cuda and select.unavailable(self.images.device) is None:
            from ..engines.triton import compile_ahead

            compile_ahead(self.body, entering(self.model, self.images)[0])
        self.ways = {**self.dense_ways(), **self.reduced_ways()}
        references = self._reference_logits()
        self.rows = [self._check(name, call, references) for name, call in self.ways.items()]
        nan = math.nan
        self.rows += [Row(name, None, nan, nan, None, None, nan, reason) for name, reason in self.absent.items()]
        self.rows += [self._add_other(other) for other in self.others]
        return self.rows

    @torch.inference_mode()
    def time(self, seconds: float = 2.0) -> list[Row]:
        """Time the ways that passed `check`, each for roughly `seconds`."""
        passed = {row.way: self.ways[row.way] for row in self.rows if not row.note}
        if "auto" in passed and not self.images.is_cuda:
            # let `auto` finish its trial of reduced against dense first
            for _ in range(trial.FIRST + trial.PAIRS):
                passed["auto"]()
        speeds = timed(passed, len(self.images), seconds)
        chose_dense = self._auto_chose_dense()
        best = max((speed for way, speed in speeds.items() if way.startswith("dense")), default=None)
        rows = []
        for row in self.rows:
            speed = speeds.get(row.way)
            ratio = speed / best if speed is not None and best is not None else None
            row = replace(row, share=1.0, ideal=1.0) if row.way == "auto" and chose_dense else row
            rows.append(replace(row, images_per_second=speed, ratio=ratio))
        return rows

    def dense_ways(self) -> dict[str, Call]:
        """The host without reduction: eager and compiled, each also in a CUDA graph on a GPU."""
        ways: dict[str, Call] = {"dense": lambda: self.dense(self.images)}
        if self.compiled:
            compiled = torch.compile(self.dense)
            ways["dense, compiled"] = lambda: compiled(self.images)
        if not self.images.is_cuda and any(hasattr(module, "fused_attn") for module in self.dense.modules()):
            # which of timm's two attention implementations is faster depends on the CPU
            unfused = copy.deepcopy(self.dense)
            for module in unfused.modules():
                if hasattr(module, "fused_attn"):
                    vars(module)["fused_attn"] = False
            ways["dense, unfused"] = lambda: unfused(self.images)
        if self.images.is_cuda:
            from ..engines.recorder import CudaRecorder

            for name, call in list(ways.items()):
                replay, output = CudaRecorder().record(call)
                ways[f"{name}, graph"] = lambda replay=replay, output=output: (replay(), output)[1]  # type: ignore[misc]
        return ways

    def reduced_ways(self) -> dict[str, Call]:
        """The model's own thresholds on each engine available here, and the fixed-rate merge."""
        ways: dict[str, Call] = {"packed": self._way("packed")}
        # Triton's interpreter, which stands in for a GPU in tests, supports float32 only
        supported = self.images.is_cuda or self.images.dtype == torch.float32
        if supported and select.unavailable(self.images.device) is None:
            ways["triton"] = self._way("triton")
            if self.images.is_cuda:
                ways["graph"] = self._graph_way("graph")
                ways["auto"] = self._graph_way("auto")
        if not self.images.is_cuda:
            ways["auto"] = self._way("auto")
        if self.baseline:
            try:
                self.fixed = rates_for(self.model, self.images[:1], "m", self._run_recorded(ways["packed"])[1])
            except UsageError as error:
                # these thresholds remove more than merging alone can
                self.absent[FIXED] = str(error)
                return ways
            ways[FIXED] = self._way("packed", self.fixed)
            if "graph" in ways:
                ways[f"{FIXED}, graph"] = self._graph_way("graph", self.fixed)
        return ways

    def _way(self, engine: str, policy: Policy | None = None) -> Call:
        """The model on the named engine, under its own policy or `policy`."""
        body = replace(self.body, policy=under(policy or self.body.policy, engine=engine))

        def call() -> Any:
            with running(body=body):
                return self.model(self.images)

        return call

    def _graph_way(self, engine: str, policy: Policy | None = None) -> Call:
        from ..engines.graph import GraphedForward

        body = replace(self.body, policy=under(policy or self.body.policy, engine=engine))
        forward = GraphedForward(body)

        def call() -> Any:
            with running(body=body):
                return forward(self.images)

        return call

    def _reference_logits(self) -> dict[str, Tensor]:
        """Float32 logits of the dense, the reduced and the fixed-rate model, on a few images."""
        few = self.images[:16].float()
        model = copy.deepcopy(self.model).float()
        body = attachment(model).body
        policies = {"reduced": body.policy} | ({} if self.fixed is None else {"fixed": self.fixed})
        logits = {}
        for kind, policy in policies.items():
            with running(body=replace(body, policy=under(policy, engine="packed"))):
                logits[kind] = answers_in(model(few))
        return {**logits, "dense": answers_in(detach(model)(few))}

    def _check(self, name: str, call: Call, references: dict[str, Tensor]) -> Row:
        """The row of one way without its speed; `note` is what is wrong with it."""
        try:
            for _ in range(3):  # the graph engine captures its graph on the second batch
                logits, share = self._run_recorded(call)
        except Exception as error:
            if "compiled" not in name:
                raise
            # there may be no compiler, or the host may not compile: the other ways can still be compared
            return Row(name, None, 1.0, 1.0, None, None, math.nan, f"torch.compile failed: {first_line(error)}")
        is_dense = name.startswith("dense") or (name == "auto" and share == 1)
        kind = "dense" if is_dense else "fixed" if name.startswith(FIXED) else "reduced"
        reference = references[kind]
        distance = _distance(logits[: len(reference)], reference)
        if not torch.isfinite(logits).all():
            return Row(name, None, share, 1 / share, None, None, distance, "logits are not finite")
        if is_dense:
            return Row(name, None, share, 1 / share, None, None, distance)
        policy = self.fixed if kind == "fixed" and self.fixed is not None else self.body.policy
        decisions, note = self._check_reduced(name, policy, share, distance, reference)
        return Row(name, None, share, 1 / share, None, decisions, distance, note)

    def _check_reduced(
        self, name: str, policy: Policy, share: float, distance: float, reference: Tensor
    ) -> tuple[float | None, str]:
        """The fraction of correct decisions of a reduced way, None if not compared, and what is wrong with the way."""
        few, allowed, decisions = len(reference), LOGITS[self.images.dtype], None
        packed_logits, packed_share = self._run_recorded(self._way("packed", policy))
        # on a CPU `auto` is the packed engine
        if name not in ("packed", FIXED) and (self.images.is_cuda or name != "auto"):
            allowed += _distance(packed_logits[:few], reference)
            decisions = decisions_agree(replace(self.body, policy=policy), entering(self.model, self.images[:few])[0])
            if decisions < DECISIONS:
                return decisions, f"only {100 * decisions:.2f} % of decisions equal the reference's"
        if abs(share - packed_share) > SHARE * max(1.0, (64 / len(self.images)) ** 0.5):
            return decisions, f"share {share:.4f} instead of {packed_share:.4f}"
        if distance > allowed:
            return decisions, f"logits are {distance:.3f} of their norm from float32's, allowed {allowed:.3f}"
        return decisions, ""

    @staticmethod
    def _run_recorded(call: Call) -> tuple[Tensor, float]:
        """Logits, and the mean FLOPs share; 1 if no tokens were recorded."""
        with record() as calls:
            logits = answers_in(call())
        return logits, calls.share().mean().item() if calls.kept else 1.0

    def _add_other(self, other: Other) -> Row:
        """Add a way supplied by the caller to `ways`, and return its row."""
        images = other.prepared(self.images)
        self.ways[other.way] = lambda: other.run(images)
        output, nan = other.run(images), math.nan
        share = other.share or next(row.share for row in self.rows if row.way == "packed")
        finite = torch.isfinite(output[0] if isinstance(output, tuple) else answers_in(output)).all()
        return Row(other.way, None, share, 1 / share, None, None, nan, "" if finite else "logits are not finite")

    def _auto_chose_dense(self) -> bool:
        """Whether `auto` found that reduction does not pay off on this CPU."""
        body = replace(self.body, policy=under(self.body.policy, engine="auto"))
        x = entering(self.model, self.images)[0]
        return trial.applies(body, x) and trial.chosen_dense(body, x)


def _distance(logits: Tensor, reference: Tensor) -> float:
    return ((logits.float() - reference.float()).norm() / reference.float().norm()).item()


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""

    def cell(value: float | None, spec: str) -> str:
        return "" if value is None or value != value else format(value, spec)

    lines = [f"{'way':<24}{'images/s':>10}{'share':>8}{'ideal':>7}{'ratio':>7}{'decisions':>11}{'logits':>9}"]
    for row in rows:
        speed, ratio = cell(row.images_per_second, ".0f"), cell(row.ratio, ".2f")
        decisions, logits = cell(row.decisions, ".3%"), cell(row.logits, ".4f")
        share, ideal = cell(row.share, ".3f"), cell(row.ideal, ".2f")
        line = f"{row.way:<24}{speed:>10}{share:>8}{ideal:>7}{ratio:>7}{decisions:>11}{logits:>9}"
        lines.append(f"{line}  {row.note}".rstrip())
    return "\n".join(lines)
