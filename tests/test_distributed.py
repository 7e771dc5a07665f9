"""Several ranks are one run with the thresholds and figures of one process; losing a rank is reported and survived."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import ltmp
from distributed_worker import EVALUATIONS, LEARNING, evaluated, learned
from ltmp import distributed
from ltmp.checkpoint import read
from ltmp.cli import main
from ltmp.errors import LTMPError

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent / "src"), os.environ.get("PYTHONPATH", "")]),
}


def start(*arguments: object) -> subprocess.Popen[str]:
    """torchrun with two ranks, on a port that it chooses."""
    command = [*TORCHRUN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


# -- what two ranks do, against one process


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of each of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    code, _, err = finish(start(HERE / "distributed_worker.py", folder))
    assert code == 0, err
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_values_are_gathered_and_added_up(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found["gathered"].tolist() == [[0, 1], [1, 2]]
        assert found["total"].item() == pytest.approx(0.3)
        assert found["exchanged"] == [{"rank": 0}, {"rank": 1}]
        assert found["skipped"] == {"0.png": "broken", "1.png": "broken"}
    assert torch.equal(ranks[0]["total"], ranks[1]["total"])


def test_gradients_of_a_mean_are_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    """Rank 0 has the value 1, rank 1 has 2 and 10: the mean of their squares is 35."""
    assert [found["mean"][0].item() for found in ranks] == [35, 35]
    assert ranks[0]["mean"][1].tolist() == pytest.approx([2 / 3, 0])
    assert ranks[1]["mean"][1].tolist() == pytest.approx([4 / 3, 20 / 3])


def test_ranks_take_turns_at_a_stream(ranks: list[dict[str, Any]]) -> None:
    images = torch.utils.data.TensorDataset(torch.arange(10), torch.arange(10))
    alone = ltmp.data.make_loader(images, 3, shuffle=True).stream(6, 30)
    assert [images.tolist() for images, _ in alone] == [
        batch for turn in zip(ranks[0]["stream"], ranks[1]["stream"], strict=True) for batch in turn
    ]


@pytest.mark.parametrize("case", LEARNING)
def test_thresholds_are_identical_on_ranks_and_those_of_one_process(case: str, ranks: list[dict[str, Any]]) -> None:
    """Two ranks with batches of 6 are one process with batches of 12."""
    first, second = (found["learned"][case] for found in ranks)
    for name in ("trail", "end", "history"):
        assert torch.equal(first[name], second[name])
    alone = learned(12, **LEARNING[case])
    assert (alone["trail"] != alone["trail"][0]).any(1).sum() == len(alone["trail"]) - 1, "nothing was learned"
    # batches of another size are summed in another order
    assert distance(first["trail"], alone["trail"]) <= 1e-6
    assert distance(first["end"], alone["end"]) <= 1e-6
    assert distance(first["history"], alone["history"]) <= 1e-5
    assert first["share"] == pytest.approx(alone["share"], abs=1e-9)
    assert first["views"] == alone["views"]


def distance(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize("case", EVALUATIONS)
def test_evaluation_is_exact_and_sees_each_image_once(case: str, ranks: list[dict[str, Any]]) -> None:
    (first, one_part), (second, other_part) = (found["evaluated"][case] for found in ranks)
    alone, seen = evaluated(**EVALUATIONS[case])
    assert first == second
    assert sorted(one_part + other_part) == seen
    assert len(one_part) > len(other_part)
    exact = ("images", "top1", "top5", "dense_top1", "dense_top5", "agreement", "share_min", "share_max", "tokens")
    assert {name: first[name] for name in exact} == {name: alone[name] for name in exact}
    for name in ("share", "share_std", "kept"):
        assert first[name] == pytest.approx(alone[name], rel=1e-12)


def test_a_rank_that_does_not_come_is_missed(ranks: list[dict[str, Any]]) -> None:
    assert "did not answer in time" in ranks[0]["deserted"]


# -- in a single process


def test_one_process_is_a_group_of_its_own() -> None:
    values = torch.tensor([1.0, 4.0])
    with distributed.group(torch.device("cpu")):
        assert (distributed.rank(), distributed.world(), distributed.is_first()) == (0, 1, True)
        assert distributed.gather(values).tolist() == [[1, 4]]
        assert torch.equal(distributed.total(values), values)
        assert distributed.mean(values) == 2.5
        assert distributed.exchange("all") == ["all"]


def test_too_few_images_for_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltmp.learning import batches

    monkeypatch.setattr(batches, "world", lambda: 4)
    with pytest.raises(LTMPError, match="3 images are too few to share among 4 ranks"):
        batches.first_images([(torch.zeros(3, 3, 16, 16), torch.zeros(3))], 8)


def test_a_loader_for_one_pass_is_refused_instead_of_waited_for() -> None:
    from ltmp.learning import batches

    batch = (torch.zeros(2, 3, 16, 16), torch.zeros(2))
    stream = batches.stream(iter([batch]), 0, 2)
    next(stream)
    with pytest.raises(LTMPError, match="used up after one pass"):
        next(stream)


@pytest.mark.parametrize(("restarts", "code"), [(0, 2), (1, 0)])
def test_after_a_restart_a_run_goes_on_by_itself(
    restarts: int, code: int, job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max-restarts gives the same command again, without --resume."""
    out = tmp_path / "run"
    assert main(["learn", *job, "--views", "12", "--batch-size", "6", "--out", str(out)]) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    # as if it had been lost just before its end
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        assert main(["learn", *job, "--views", "12", "--batch-size", "6", "--out", str(out)]) == 0
    assert (out / "run.pt").exists()
    assert main(["learn", *job, "--views", "12", "--batch-size", "6", "--out", str(out)]) == code


# -- the command line


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a tiny model and 18 images to learn from and 15 to check on."""
    folder = tmp_path_factory.mktemp("job")
    shape = {"patch_size": 8, "embed_dim": 24, "depth": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **shape)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), folder / "model.safetensors")
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 5)):
        for name in ("ant", "bee", "cow"):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = noise.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(folder / split / name / f"{k}.png")
    options = ["--model", "vit_tiny_patch16_224", "--img-size", 32, "--num-classes", 3, "--device", "cpu"]
    options += ["--model-kwargs", " ".join(f"{name}={value}" for name, value in shape.items())]
    return [*map(str, options), "--weights", str(folder / "model.safetensors"), "--data", str(folder)]


def test_a_killed_rank_ends_the_run_with_a_message_and_another_process_goes_on(job: list[str], tmp_path: Path) -> None:
    """Two ranks, one of which is killed; one process with batches as large as both ranks' ends the run."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    settings = ["--views", "2880", "--target", "0.7", "--json", "-"]
    process = start("-m", "ltmp", "learn", *job, *settings, "--batch-size", 6, "--out", out)
    wait_for(out / "run.pt", process)
    os.kill(youngest_child(process.pid), signal.SIGKILL)
    code, printed, err = finish(process)
    assert code == 1
    assert printed == ""
    told = [line for line in err.splitlines() if line.startswith("error")]
    assert len(told) == 1
    assert "rank of this run was lost" in told[0] or "ended from outside" in told[0]
    assert told[0].startswith("error (rank ")
    assert told[0].endswith(f"the run is saved in {out / 'run.pt'}: give the same command with --resume to go on")
    assert os.listdir(out) == ["run.pt"]

    alone = ["--batch-size", "12", *settings]
    assert main(["learn", *job, *alone, "--out", str(out), "--resume"]) == 0
    assert main(["learn", *job, *alone, "--out", str(whole)]) == 0
    ends = [read(folder / "thresholds.safetensors") for folder in (out, whole)]
    assert distance(ends[0].merge, ends[1].merge) <= 1e-6
    assert distance(ends[0].prune, ends[1].prune) <= 1e-6


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, finish(process)[2]
        time.sleep(0.05)


def youngest_child(parent: int) -> int:
    found = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=True).stdout.split()
    assert len(found) == 2
    return max(map(int, found))


def test_two_ranks_learn_and_evaluate_and_one_of_them_speaks(
    job: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--views", "72", "--target", "0.7", "--json", "-"]
    code, printed, err = finish(
        start("-m", "ltmp", "learn", *job, *settings, "--batch-size", 6, "--out", tmp_path / "two")
    )
    assert code == 0, err
    together = json.loads(printed)
    assert err.count("learning, loss") == 6
    # rank 0 has the first and the last of three batches
    assert err.count("evaluating (9 of 9)") == 1
    assert os.listdir(tmp_path / "two") == ["thresholds.safetensors"]

    assert main(["learn", *job, *settings, "--batch-size", "12", "--out", str(tmp_path / "one")]) == 0
    alone = json.loads(capsys.readouterr().out)
    assert {name: together[name] for name in ("share", "top1", "top1_dense", "views")} == pytest.approx(
        {name: alone[name] for name in ("share", "top1", "top1_dense", "views")}
    )
    first, second = (read(tmp_path / name / "thresholds.safetensors") for name in ("one", "two"))
    assert distance(first.merge, second.merge) <= 1e-6
    assert distance(first.prune, second.prune) <= 1e-6


def test_errors_name_the_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "--data", "gone", "--thresholds", "gone.safetensors"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 1 of 2): no thresholds file")
    assert main(["bench", "--data", "gone", "--thresholds", "gone.safetensors"]) == 2
    assert "`bench` runs in one process: start it without torchrun" in capsys.readouterr().err


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from ltmp.cli.options import pick_device
    from ltmp.errors import UsageError

    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "64")
    monkeypatch.setenv("LOCAL_RANK", "9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(UsageError, match="no device 'cuda:9' here: 8 CUDA devices are visible"):
        pick_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "7")
    assert pick_device("auto") == torch.device("cuda:7")
