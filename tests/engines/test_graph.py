"""Control flow of the graph engine, with a stand-in for CUDA graphs: what is recorded, and when it must not be."""

from __future__ import annotations

import copy
import logging
import os
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_

import ltmp
from helpers import assert_close, attach_reducing, liven, make_probe, random_images, run_recorded, tiny_vit
from ltmp.config import FIXED
from ltmp.engines.body import running
from ltmp.engines.capacity import Capacity
from ltmp.evaluate.compare import rates_for
from ltmp.hosts.attach import attachment
from ltmp.learning import learn_probe
from ltmp.method.dial import Dial, keep_on

pytest.importorskip("triton")
from ltmp.engines import capacity, graph
from ltmp.engines.capacity import SLACK, plan_capacity
from ltmp.engines.graph import GraphedForward
from ltmp.engines.recorder import CudaRecorder

# batches that exceed their capacity leave garbage in it, of which NumPy warns
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SIZE = 12


def images_of(count: int, seed: int = 0) -> Tensor:
    return random_images(count, size=SIZE, seed=seed).to(DEVICE)


class Rerun:
    """A recorder without a GPU: a replay runs the call again and fills the first outputs."""

    def __init__(self, full: bool = False, times: tuple[float, ...] = ()) -> None:
        self.recorded = self.replayed = 0
        self.full, self.times, self.released = full, list(times), False

    def record(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if self.full:
            raise torch.OutOfMemoryError("no room")
        outputs = call()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tree_map_(lambda old, new: old.copy_(new), outputs, call())

        return replay, outputs

    def seconds(self, replay: Callable[[], None]) -> float:
        return self.times.pop(0)

    def release(self) -> None:
        self.released = True


class Case:
    """A reduced model, the same model on the packed engine, and the graphs between caller and host."""

    def __init__(
        self, recorder: Any = None, engine: str = "graph", graphs: int = 8, settings: Any = None, **kwargs: Any
    ) -> None:
        self.recorder = recorder or Rerun()
        config = ltmp.LTMPConfig(**settings or {})
        small = tiny_vit(**{"img_size": SIZE, "depth": 2, **kwargs})
        reduced = ltmp.attach(small, config) if config.method.fixed else attach_reducing(small, images_of(4).cpu())
        self.model = reduced.to(DEVICE).requires_grad_(False)
        self.packed = copy.deepcopy(self.model)
        for model, name in ((self.packed, "packed"), (self.model, engine)):
            model.ltmp.config = replace(config, engine=name)
        self.forward = GraphedForward(attachment(self.model).body, self.recorder, graphs)
        self.model.forward = self.forward

    def check(self, images: int, seed: int = 0) -> None:
        """Assert that the graph engine returns the counts and logits of the packed one."""
        batch = images_of(images, seed)
        (found, kept), (expected, counts) = run_recorded(self.model, batch), run_recorded(self.packed, batch)
        assert kept.tolist() == counts.tolist()
        assert_close(found, expected, 1e-4)

    def apply(self, change: Callable[[Any], Any]) -> None:
        """Apply the same change to both models."""
        change(self.model)
        change(self.packed)


def test_other_scores_are_recorded_again() -> None:
    case = Case(depth=3)
    for _ in range(2):
        case.check(4)

    def count_for_less(model: Any) -> None:
        config = model.ltmp.config
        model.ltmp.config = replace(config, scores=replace(config.scores, size_power=0.2))

    before = run_recorded(case.packed, images_of(4))[0]
    case.apply(count_for_less)
    assert not torch.allclose(run_recorded(case.packed, images_of(4))[0], before, atol=1e-4)
    for _ in range(2):
        case.check(4)
    assert case.recorder.recorded == 2


def test_second_batch_of_a_size_is_recorded_and_later_ones_replayed() -> None:
    case = Case()
    for seed in range(4):
        case.check(4, seed % 2)
    assert (case.recorder.recorded, case.recorder.replayed) == (1, 3)


def test_hosts_that_are_called_by_keyword_and_return_objects() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=4
    )
    model = liven(transformers.ViTForImageClassification(config)).eval().to(DEVICE).requires_grad_(False)
    ltmp.attach(model, ltmp.LTMPConfig(engine="graph")).ltmp.set([0.6, 0.6], [0.05, 0.05])
    packed = copy.deepcopy(model)
    packed.ltmp.config = ltmp.LTMPConfig(engine="packed")
    model.forward = GraphedForward(attachment(model).body, Rerun())
    for seed in range(3):
        batch = images_of(4, seed)
        (found, kept), (expected, counts) = (run_recorded(m, pixel_values=batch) for m in (model, packed))
        assert kept.tolist() == counts.tolist()
        assert_close(found.logits, expected.logits, 1e-4)
    assert model.forward.recorder.recorded == 1


@pytest.mark.parametrize(
    "settings",
    [{"variant": variant, "r": 2} for variant in FIXED] + [{"floor": 4}, {"ceiling": 7}, {"variant": "pm", "r": 0.2}],
    ids=str,
)
def test_every_policy_is_recorded(settings: dict[str, Any]) -> None:
    case = Case(settings=settings)
    for seed in range(3):
        case.check(4, seed)
    case.check(3, 3)  # a tail
    assert case.recorder.recorded == 1
    assert case.recorder.replayed >= 2


def test_results_do_not_change_under_the_caller() -> None:
    case = Case()
    case.check(4)
    first, second = (images_of(4, seed) for seed in (0, 1))
    logits = case.model(first)
    before = logits.clone()
    case.model(second)
    assert torch.equal(logits, before)


def test_tail_fills_a_recorded_batch() -> None:
    case = Case()
    case.check(4)
    case.check(4)
    case.check(3, seed=2)
    assert (case.recorder.recorded, case.recorder.replayed) == (1, 2)
    case.check(1, seed=3)
    assert case.recorder.replayed == 2, "one image would waste three quarters of the batch"


def test_a_tail_that_overflows_leaves_the_larger_graph_alone() -> None:
    case = Case()
    case.check(4)
    case.check(4)
    (key, large), *_ = case.forward._recorded.items()
    large.capacity = Capacity(tuple(n // 8 for n in large.capacity.rows), large.capacity.longest)
    case.check(3, seed=2)
    assert list(case.forward._recorded) == [key], "the graph of four images is gone"
    assert set(case.forward._slack.values()) == {SLACK}
    case.check(3, seed=2)
    assert [k[0] for k in case.forward._recorded] == [4, 3]


def test_overflow_is_run_again_and_capacity_grows() -> None:
    case = Case()
    case.check(4)
    (key, room), *_ = case.forward._capacities.items()
    case.forward._capacities[key] = Capacity(tuple(n // 3 for n in room.rows), room.longest)
    case.check(4)
    assert (case.recorder.recorded, case.recorder.replayed) == (1, 1), "recorded with too little room, then run exactly"
    case.check(4)
    case.check(4)
    assert (case.recorder.recorded, case.recorder.replayed) == (2, 3)
    assert case.forward._slack[key] == 2 * SLACK


def test_too_long_an_image_is_an_overflow() -> None:
    assert not Capacity((100, 90), (50, 40)).fits([[100, 50, 0], [80, 41, 0]])
    assert not Capacity((100, 90), (50, 40)).fits([[101, 50, 0], [80, 40, 0]])
    assert Capacity((100, 90), (50, 40)).fits([[100, 50, 0], [90, 40, 0]])


def test_plan_never_grows_from_block_to_block_nor_past_the_start() -> None:
    plan = plan_capacity([[0, 0, 0], [1000, 99, 0], [0, 0, 0], [999, 50, 0]], tokens=100, rows=1010)
    assert plan.rows == (1010, 1010, 1010, 1010)
    assert plan.longest == (100, 100, 100, 64)
    wider = plan_capacity([[500, 60, 0]], tokens=100, rows=1000, minimum=Capacity((700,), (64,)))
    assert wider == Capacity((700,), (80,))


def test_new_thresholds_are_never_stale() -> None:
    case = Case()
    case.check(4)
    case.check(4)
    lower = (case.model.ltmp.merge - 0.1).tolist()
    case.apply(lambda model: model.ltmp.set(lower, None))
    case.check(4)
    case.check(4)


def test_a_new_probe_is_recorded_again() -> None:
    case = Case(settings={"scores": "best"})
    for seed in range(3):
        case.apply(lambda model, seed=seed: model.ltmp.set_probe(make_probe(2, seed=seed)))
        for _ in range(3):
            case.check(4, seed)
    assert case.recorder.recorded == 3


def test_a_step_switched_on_or_off_is_recorded_again() -> None:
    case = Case()
    case.check(4)
    case.check(4)
    case.apply(lambda model: model.ltmp.set([1.0, 0.5], [0.0, 0.0]))
    case.check(4)
    case.check(4)
    assert case.recorder.recorded == 2


@pytest.mark.parametrize("change", ["cast", "new weights", "loaded", "train"])
def test_model_changed_after_recording(change: str) -> None:
    case = Case()
    case.check(4)
    case.check(4)
    other = {name: value * 1.1 for name, value in tiny_vit(seed=3, img_size=SIZE, depth=2).state_dict().items()}

    def apply(model: Any) -> None:
        if change == "cast":
            model.double().float()
        elif change == "new weights":
            for name, value in other.items():
                if "blocks.1" in name:
                    model.get_parameter(name).data = value.to(DEVICE)
        elif change == "loaded":
            model.load_state_dict(other, strict=False)
        else:
            model.train()
            model.eval()

    case.apply(apply)
    case.check(4)
    case.check(4)


def test_other_image_size_has_its_own_graph() -> None:
    case = Case(dynamic_img_size=True)
    for size in (12, 16, 12, 16, 12, 16):
        images = random_images(4, size=size).to(DEVICE)
        assert_close(case.model(images), case.packed(images), 1e-4)
    assert case.recorder.recorded == 2


def test_far_too_large_a_capacity_is_planned_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_PATIENCE", 2)
    monkeypatch.setattr(capacity, "_ROWS", 1)
    case = Case()
    case.check(4)
    case.check(4)
    before = case.forward._capacities.copy()
    case.apply(lambda model: model.ltmp.set([-1.0, -1.0], [1.0, 1.0]))
    for _ in range(3):
        case.check(4)
    assert all(case.forward._capacities[key].rows < room.rows for key, room in before.items())


def test_least_recently_used_graph_is_evicted() -> None:
    case = Case(graphs=2)
    for images in (1, 3, 7):
        case.check(images)
        case.check(images)
    assert [key[0] for key in case.forward._recorded] == [3, 7]


def test_no_memory_while_recording(caplog: pytest.LogCaptureFixture) -> None:
    case = Case(Rerun(full=True))
    with caplog.at_level(logging.WARNING, "ltmp"):
        for _ in range(3):
            case.check(4)
    assert [record.message for record in caplog.records] == [
        "no memory for a CUDA graph of 4 images: they run without one, more slowly"
    ]
    assert case.recorder.released


def test_auto_runs_dense_where_that_is_faster(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # by name, `auto` would take the packed engine here
    monkeypatch.setattr(GraphedForward, "automatic", True)
    case = Case(Rerun(times=(2e-3, 1e-3)))
    case.check(4)
    images = images_of(4)
    with caplog.at_level(logging.WARNING, "ltmp"):
        for _ in range(3):
            logits, kept = run_recorded(case.model, images)
            with ltmp.dense():
                assert_close(logits, case.packed(images), 1e-5)
            assert kept.unique().tolist() == [10.0]
    assert len(caplog.records) == 1
    assert "does not pay for batches of 4" in caplog.records[0].message


def test_other_thresholds_of_a_thread_are_never_mistaken_for_its_own() -> None:
    case = Case()
    body, other = attachment(case.model).body, copy.deepcopy(case.model.ltmp)
    other.set(None, [0.3] * 2)
    case.check(4)
    case.check(4)
    twin = copy.deepcopy(case.packed)
    twin.ltmp.set(None, [0.3] * 2)
    images = images_of(4)
    _, wanted = run_recorded(twin, images)
    for _ in range(3):
        with running(body=replace(body, policy=other)):
            _, kept = run_recorded(case.model, images)
        assert kept.tolist() == wanted.tolist()
        case.check(4)
    assert case.recorder.recorded == 2


def test_fixed_rates_are_found_where_auto_runs_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedForward, "automatic", True)
    case = Case(Rerun(times=(2e-3, 1e-3) * 20), img_size=SIZE, depth=6)
    image = images_of(1)
    for _ in range(3):
        case.model(image)
    rates = rates_for(case.model, image, "m", 0.6)
    rates.config = replace(rates.config, engine="packed")
    with ltmp.record() as calls, running(body=replace(attachment(case.packed).body, policy=rates)):
        case.packed(image)
    assert abs(calls.share().item() - 0.6) < 0.05


def test_auto_reduces_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedForward, "automatic", True)
    case = Case(Rerun(times=(1e-3, 2e-3)))
    for _ in range(3):
        case.check(4)


def test_all_off_is_dense() -> None:
    case = Case()
    case.apply(lambda model: model.ltmp.set([1.0] * 2, [0.0] * 2))
    for _ in range(3):
        case.check(4)


def test_calls_that_are_not_plain_inference_are_left_to_the_host() -> None:
    case = Case()
    case.check(4)
    images = images_of(4)
    with ltmp.dense():
        assert_close(case.model(images), case.packed(images), 0)
    case.model.train()
    case.model(images)
    assert case.recorder.recorded == 0


def test_gradients_pass_through_a_model_with_the_graph_engine() -> None:
    """The policy that learns a probe is not supported by graphs, even if no weight of the model trains."""
    case = Case(settings={"scores": "best"})
    for _ in range(3):
        learn_probe(case.model, images_of(4))
    learn_probe(case.packed, images_of(4))
    assert case.recorder.recorded == 0
    assert torch.equal(case.model.ltmp.probe, case.packed.ltmp.probe)


@pytest.mark.parametrize("host", [{"global_pool": "avg"}, {"reg_tokens": 4}], ids=str)
def test_patches_are_traced_inside_graphs(host: dict[str, Any]) -> None:
    """Grids and sources have graphs of their own, agree with packed, and are copied for each caller."""
    case = Case(**host)
    kept: list[tuple[Tensor, Tensor]] = []
    for seed in range(4):
        for unmerged in (False, True):
            images, found = images_of(4, seed % 3), []
            for model in (case.model, case.packed):
                form = ltmp.unmerge() if unmerged else nullcontext()
                with ltmp.record() as calls, ltmp.trace(every_block=True) as traced, form:
                    output = model(images)
                found.append((output, calls.kept[0], traced.sources[0], traced.blocks[0]))
            (output, *others), (expected, *wanted) = found
            assert_close(output, expected, 1e-4)
            assert all(torch.equal(a, b) for a, b in zip(others, wanted, strict=True))
            kept += [(value, value.clone()) for value in (output, *others)]
    assert (case.recorder.recorded, case.recorder.replayed) == (2, 6)
    assert all(torch.equal(value, before) for value, before in kept)
    case.check(4)
    assert case.recorder.recorded == 2, "this call is not traced, and the first of its kind"


def test_a_grid_that_exceeds_its_capacity_is_run_again() -> None:
    case = Case(global_pool="avg")
    for model in (case.model, case.packed):
        model.ltmp.tokens = "grid"
    case.check(4)
    (key, room), *_ = case.forward._capacities.items()
    case.forward._capacities[key] = Capacity(tuple(n // 3 for n in room.rows), room.longest)
    for seed in range(3):
        case.check(4, seed)
    assert case.recorder.recorded == 2
    case.apply(lambda model: model.ltmp.set([1.0] * 2, [0.0] * 2))
    for seed in range(3):
        case.check(4, seed)


def test_features_between_blocks_are_computed_inside_the_graph() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=SIZE, patch_size=4,
        output_hidden_states=True,
    )  # fmt: skip
    model = liven(transformers.ViTForImageClassification(config)).eval().to(DEVICE).requires_grad_(False)
    ltmp.attach(model, ltmp.LTMPConfig(engine="graph", tokens="grid")).ltmp.set([0.6, 0.6], [0.05, 0.05])
    packed = copy.deepcopy(model)
    packed.ltmp.config = ltmp.LTMPConfig(engine="packed", tokens="grid")
    model.forward = GraphedForward(attachment(model).body, Rerun())
    for seed in range(4):
        batch = images_of(4, seed)
        found, expected = model(batch), packed(batch)
        for a, b in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert_close(a, b + 0, 1e-4)
    assert model.forward.recorder.recorded == 1


def test_copies_and_pickles_start_without_graphs() -> None:
    case = Case()
    case.check(4)
    case.check(4)
    images = images_of(4)
    for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        assert twin.forward.host is twin
        assert not twin.forward._recorded
        assert_close(twin(images), case.model(images), 1e-4)


def dial_of(model: Any, budgets: tuple[float, ...]) -> Dial:
    """A dial of thresholds for about these budgets, with the tokens that they really keep."""
    rows, images = [], images_of(4).cpu()
    twin = ltmp.detach(copy.deepcopy(model)).cpu()
    for at in budgets:
        reduced = attach_reducing(copy.deepcopy(twin), images, at=at)
        rows.append(
            (reduced.ltmp.merge.detach(), reduced.ltmp.prune.detach(), run_recorded(reduced, images)[1].mean(0))
        )
    merge, prune, kept = (torch.stack(column) for column in zip(*rows, strict=True))
    return Dial(torch.tensor(budgets), *keep_on(merge, prune), kept)


class Dialled(Case):
    """A case with a dial from 0.5 to 0.9, whose capacities are not rounded up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **kwargs: Any) -> None:
        monkeypatch.setattr(capacity, "_ROWS", 1)
        super().__init__(**kwargs)
        dial = dial_of(self.model, (0.5, 0.6, 0.75, 0.9))
        self.apply(lambda model: model.ltmp.set_dial(dial))

    def at(self, share: float) -> None:
        """Check a batch at a budget: always the same one, as others of four images with ten tokens would overflow."""
        self.apply(lambda model: model.ltmp.set_budget(share))
        self.check(4)


def test_going_back_and_forth_on_the_dial_records_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Dialled(monkeypatch)
    budgets = (0.5, 0.7, 0.9)
    for i in range(15):
        case.at(budgets[i % 3])
    assert case.recorder.recorded == 3
    assert case.recorder.replayed == 15 - 3
    kept = [case.forward._capacities[key].rows[-1] for key in case.forward._recorded]
    assert kept == sorted(kept)
    assert len(set(kept)) == 3, "each level has a room of its own"


def test_budgets_of_a_level_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Dialled(monkeypatch)
    for i in range(8):
        # the level goes from 0.5625 to 0.625, and the first batch is near its lower end
        case.at(0.57 + 0.055 * (i / 7))
    assert case.recorder.recorded == 1
    assert len(case.forward._recorded) == 1


def test_a_level_is_not_wasteful_at_its_lower_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_PATIENCE", 3)
    case = Dialled(monkeypatch)
    for _ in range(6):
        case.at(0.57)
    assert case.recorder.recorded == 1


def test_one_on_the_dial_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Dialled(monkeypatch)
    for share in (0.5, 1.0) * 3:
        case.at(share)
    assert case.recorder.recorded == 2


def test_thresholds_set_by_hand_leave_the_dials_graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Dialled(monkeypatch)
    for _ in range(3):
        case.at(0.5)
    case.apply(lambda model: model.ltmp.set([0.9] * 2, [0.01] * 2))
    for _ in range(3):
        case.check(4)
    case.at(0.5)
    assert case.recorder.recorded == 2
    # behind the dial's back: only room is at stake
    case.apply(lambda model: model.ltmp.merge.data.fill_(0.99))
    case.check(4)
    case.check(4)


def stress(batches: int, recorder: Any) -> GraphedForward:
    """Check random batch sizes, contents and thresholds, with capacities that are too small on purpose."""
    generator = torch.Generator().manual_seed(0)
    case = Case(recorder, graphs=3)
    start = case.model.ltmp.merge.clone()
    for i in range(batches):
        if i % 7 == 3:
            values = (start + 0.2 * torch.rand((), generator=generator).to(DEVICE) - 0.1).tolist()
            case.apply(lambda model, values=values: model.ltmp.set(values, None))
        if i % 11 == 5:
            for key, room in case.forward._capacities.items():
                case.forward._capacities[key] = Capacity(tuple(max(1, n // 2) for n in room.rows), room.longest)
                case.forward._recorded.pop(key, None)
        case.check(int(torch.randint(1, 4, (), generator=generator)), seed=i)
    return case.forward


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stress() -> None:
    """300 batches (LTMP_STRESS=300) take five minutes in the interpreter; 24 cover every kind of event."""
    recorder = Rerun()
    stress(int(os.environ.get("LTMP_STRESS", "24")), recorder)
    assert recorder.replayed > 10


needs_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_stress_on_a_gpu() -> None:
    stress(10_000, CudaRecorder())


@pytest.mark.gpu
@needs_gpu
def test_cuda_graphs_survive_drops_and_overflows() -> None:
    case = Case(CudaRecorder())
    for images in (2, 2, 3, 3):
        case.check(images)
    assert len(case.forward._recorded) == 2
    for key, room in case.forward._capacities.items():
        case.forward._capacities[key] = Capacity(tuple(max(1, n // 3) for n in room.rows), room.longest)
    case.forward._recorded.clear()
    for images in (2, 2, 2, 3, 3, 3):
        case.check(images)
    assert len(case.forward._recorded) == 2
