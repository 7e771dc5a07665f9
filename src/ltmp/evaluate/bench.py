"""Images per second of every way to run a model, side by side in one process, after a check that they agree.

A way whose decisions or logits are wrong has no speed: the check comes first, and a red one leaves the column empty.
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
"""How far a way's mean FLOPs share may be from the packed engine's over 64 images or more; fewer average out less."""

LOGITS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far logits may be from float32 beyond what the packed engine's are, as a share of their norm.

One decision that rounding flips moves every later token of its image to the other parity, so half precision is judged
by its decisions; this catches what is broken, not what is rounded.
"""


@dataclass(frozen=True)
class Row:
    """One way to run the model.

    Attributes:
        way: its name.
        images_per_second: median over the rounds, None where the check is red.
        share: mean FLOPs share of its images; 1 for dense.
        ideal: 1 / share.
        ratio: speed over the fastest dense way, None where either is missing.
        decisions: share of decisions equal to the reference's on the same inputs, None where none were compared.
        logits: distance of its logits from float32, as a share of their norm.
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
        """Plain values, None for what is not a number: JSON knows none."""
        return {name: None if value != value else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Other:
    """A way that a caller brings, whose outputs are its own affair.

    Attributes:
        way: its name; run: images to an output.
        share: of the dense FLOPs; None where it is the reduced model's.
        prepared: what is done to images [B, C, H, W] before they are timed.
    """

    way: str
    run: Callable[[Any], Any]
    share: float | None
    prepared: Callable[[Tensor], Any] = lambda images: images


class Bench:
    """All ways to run one attached model on one batch.

    Args:
        model: attached, in evaluation mode, on its device and in its type; left as it was.
        images: [B, 3, H, W] like it.
        compiled: try `torch.compile` for the dense model, too.
        baseline: compare with a fixed-rate merge at the same share.
        others: more ways to time.
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

    def dense_ways(self) -> dict[str, Call]:
        """The host without reduction: eager and compiled, plain and in a CUDA graph."""
        ways: dict[str, Call] = {"dense": lambda: self.dense(self.images)}
        if self.compiled:
            compiled = torch.compile(self.dense)
            ways["dense, compiled"] = lambda: compiled(self.images)
        if not self.images.is_cuda and any(hasattr(module, "fused_attn") for module in self.dense.modules()):
            # which of timm's two attentions is faster on a CPU differs from one to the next
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
        """The model's own thresholds on each engine that runs here, and the fixed rate."""
        ways: dict[str, Call] = {"packed": self._way("packed")}
        # Triton's interpreter, which stands in for a GPU in tests, knows float32 only
        knows = self.images.is_cuda or self.images.dtype == torch.float32
        if knows and select.unavailable(self.images.device) is None:
            ways["triton"] = self._way("triton")
            if self.images.is_cuda:
                ways["graph"] = self._graph_way("graph")
                ways["auto"] = self._graph_way("auto")
        if not self.images.is_cuda:
            ways["auto"] = self._way("auto")
        if self.baseline:
            try:
                self.fixed = rates_for(self.model, self.images[:1], "m", self._recorded(ways["packed"])[1])
            except UsageError as error:
                # so much less than these thresholds leave is not to be had by merging alone
                self.absent[FIXED] = str(error)
                return ways
            ways[FIXED] = self._way("packed", self.fixed)
            if "graph" in ways:
                ways[f"{FIXED}, graph"] = self._graph_way("graph", self.fixed)
        return ways

    def _way(self, engine: str, policy: Policy | None = None) -> Call:
        """The model on a named engine, by its own policy or another one."""
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

    @staticmethod
    def _recorded(call: Call) -> tuple[Tensor, float]:
        """Logits, and the mean FLOPs share; 1 where nothing was recorded."""
        with record() as calls:
            logits = answers_in(call())
        return logits, calls.share().mean().item() if calls.kept else 1.0

    def run(self, seconds: float = 2.0) -> list[Row]:
        """Check every way, then time those that pass, in turns; `seconds` is roughly how long to time each."""
        self.check()
        return self.time(seconds)

    @torch.inference_mode()
    def check(self) -> list[Row]:
        """Run every way a few times, which compiles what it needs, and compare it with float32; rows have no speed yet.

        Raises:
            LTMPError: the model is in train mode.
        """
        if self.model.training or self.body.policy.training:
            raise LTMPError("a model is timed as deployed: call model.eval() first")
        if self.images.is_cuda and select.unavailable(self.images.device) is None:
            from ..engines.triton import compile_ahead

            compile_ahead(self.body, entering(self.model, self.images)[0])
        self.ways = {**self.dense_ways(), **self.reduced_ways()}
        exact = self._reference()
        self.rows = [self._checked(name, call, exact) for name, call in self.ways.items()]
        nan = math.nan
        self.rows += [Row(name, None, nan, nan, None, None, nan, why) for name, why in self.absent.items()]
        self.rows += [self._brought(other) for other in self.others]
        return self.rows

    @torch.inference_mode()
    def time(self, seconds: float = 2.0) -> list[Row]:
        """Speeds of the ways that `check` found right."""
        right = {row.way: self.ways[row.way] for row in self.rows if not row.note}
        if "auto" in right and not self.images.is_cuda:
            for _ in range(trial.FIRST + trial.PAIRS):
                right["auto"]()
        speeds = timed(right, len(self.images), seconds)
        chose_dense = self._chose_dense()
        best = max((speed for way, speed in speeds.items() if way.startswith("dense")), default=None)
        done = []
        for row in self.rows:
            speed = speeds.get(row.way)
            ratio = speed / best if speed is not None and best is not None else None
            row = replace(row, share=1.0, ideal=1.0) if row.way == "auto" and chose_dense else row
            done.append(replace(row, images_per_second=speed, ratio=ratio))
        return done

    def _chose_dense(self) -> bool:
        """Whether `auto` found on this CPU that reduction does not pay."""
        body = replace(self.body, policy=under(self.body.policy, engine="auto"))
        x = entering(self.model, self.images)[0]
        return trial.applies(body, x) and trial.chosen_dense(body, x)

    def _brought(self, other: Other) -> Row:
        """The row of a way that the caller brought, which from here on is one of `ways`."""
        images = other.prepared(self.images)
        self.ways[other.way] = lambda: other.run(images)
        output, nan = other.run(images), math.nan
        share = other.share or next(row.share for row in self.rows if row.way == "packed")
        finite = torch.isfinite(output[0] if isinstance(output, tuple) else answers_in(output)).all()
        return Row(other.way, None, share, 1 / share, None, None, nan, "" if finite else "logits are not finite")

    def _reference(self) -> dict[str, Tensor]:
        """Logits of the dense, the reduced and the fixed-rate model in float32, on a few images."""
        few = self.images[:16].float()
        reduced = copy.deepcopy(self.model).float()
        body, found = attachment(reduced).body, {}
        policies = {"reduced": body.policy} | ({} if self.fixed is None else {"fixed": self.fixed})
        for kind, policy in policies.items():
            with running(body=replace(body, policy=under(policy, engine="packed"))):
                found[kind] = answers_in(reduced(few))
        return {**found, "dense": answers_in(detach(reduced)(few))}

    def _checked(self, name: str, call: Call, exact: dict[str, Tensor]) -> Row:
        """The row of one way without its speed; `note` says what is wrong with it."""
        try:
            for _ in range(3):  # the graph engine takes two batches to get going
                logits, share = self._recorded(call)
        except Exception as error:
            if "compiled" not in name:
                raise
            # no compiler on this machine, or a host that it does not know: the other ways can still be compared
            return Row(name, None, 1.0, 1.0, None, None, math.nan, f"torch.compile failed: {first_line(error)}")
        is_dense = name.startswith("dense") or (name == "auto" and share == 1)
        kind = "dense" if is_dense else "fixed" if name.startswith(FIXED) else "reduced"
        wanted = exact[kind]
        distance = _distance(logits[: len(wanted)], wanted)
        if not torch.isfinite(logits).all():
            return Row(name, None, share, 1 / share, None, None, distance, "logits are not finite")
        if is_dense:
            return Row(name, None, share, 1 / share, None, None, distance)
        policy = self.fixed if kind == "fixed" and self.fixed is not None else self.body.policy
        decisions, note = self._judged(name, policy, share, distance, wanted)
        return Row(name, None, share, 1 / share, None, decisions, distance, note)

    def _judged(
        self, name: str, policy: Policy, share: float, distance: float, wanted: Tensor
    ) -> tuple[float | None, str]:
        """How many decisions of a reduced way are right, and what is wrong with it."""
        few, allowed, decisions = len(wanted), LOGITS[self.images.dtype], None
        packed_logits, wanted_share = self._recorded(self._way("packed", policy))
        # on a CPU `auto` is the packed engine
        if name not in ("packed", FIXED) and (self.images.is_cuda or name != "auto"):
            allowed += _distance(packed_logits[:few], wanted)
            decisions = decisions_agree(replace(self.body, policy=policy), entering(self.model, self.images[:few])[0])
            if decisions < DECISIONS:
                return decisions, f"only {100 * decisions:.2f} % of decisions equal the reference's"
        if abs(share - wanted_share) > SHARE * max(1.0, (64 / len(self.images)) ** 0.5):
            return decisions, f"share {share:.4f} instead of {wanted_share:.4f}"
        if distance > allowed:
            return decisions, f"logits are {distance:.3f} of their norm from float32's, allowed {allowed:.3f}"
        return decisions, ""


def _distance(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None or value != value else format(value, form)

    lines = [f"{'way':<24}{'images/s':>10}{'share':>8}{'ideal':>7}{'ratio':>7}{'decisions':>11}{'logits':>9}"]
    for row in rows:
        speed, ratio = cell(row.images_per_second, ".0f"), cell(row.ratio, ".2f")
        decisions, logits = cell(row.decisions, ".3%"), cell(row.logits, ".4f")
        share, ideal = cell(row.share, ".3f"), cell(row.ideal, ".2f")
        line = f"{row.way:<24}{speed:>10}{share:>8}{ideal:>7}{ratio:>7}{decisions:>11}{logits:>9}"
        lines.append(f"{line}  {row.note}".rstrip())
    return "\n".join(lines)
