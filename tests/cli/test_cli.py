"""Every verb does its job from the command line and says in one sentence why it cannot."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
import torch

import ltmp as package
from ltmp.cli import main
from ltmp.cli.options import parse_kwargs
from ltmp.errors import UsageError

LEARN = ("--views", 12, "--batch-size", 3, "--target", 0.7)


def error(capsys) -> str:
    """The one line on stderr that says what went wrong."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_learn_then_eval_then_info(ltmp, images, tmp_path, capsys):
    out = tmp_path / "run"
    assert ltmp("learn", "--data", images, "--out", out, *LEARN, "--json", out / "learn.json") == 0
    assert "(4 of 4)" in capsys.readouterr().err
    file = out / "thresholds.safetensors"
    assert file.stat().st_size < 10_000
    learned = json.loads((out / "learn.json").read_text())
    assert (learned["target"], len(learned["history"])) == (0.7, 4)
    assert {"model_name", "share", "top1", "top1_dense", "views"} <= learned.keys()
    assert not (out / "run.pt").exists()

    result, table = tmp_path / "eval.json", tmp_path / "eval.csv"
    assert ltmp("eval", "--data", images, "--thresholds", file, "--json", result, "--csv", table) == 0
    measured = json.loads(result.read_text())
    assert (measured["images"], measured["tokens"], len(measured["kept"])) == (6, 17, 3)
    assert measured["share"] == pytest.approx(learned["share"])
    assert measured["top1"] == pytest.approx(learned["top1"])
    assert [row["model"] for row in csv.DictReader(table.open())] == ["dense", "reduced"]

    capsys.readouterr()
    assert ltmp("info", file, "--json", "-") == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["variant"], about["target"], len(about["merge"])) == ("ltmp", 0.7, 3)


def test_name_with_a_tag_fits_its_own_thresholds(weights, images, tmp_path):
    from .conftest import MODEL, NAME

    own = ["--model", f"{NAME}.augreg_in21k_ft_in1k", *MODEL[2:], "--weights", str(weights), "--data", str(images)]
    assert main(["learn", *own, *map(str, LEARN), "--out", str(tmp_path)]) == 0
    file = tmp_path / "thresholds.safetensors"
    assert main(["eval", *own[2:], "--thresholds", str(file)]) == 0
    assert package.checkpoint.read(file).metadata["model_name"] == own[1]


def test_json_of_learning_on_screen(ltmp, images, tmp_path, capsys):
    assert ltmp("learn", "--data", images, "--out", tmp_path / "run", *LEARN, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["target"] == 0.7


def test_info_without_a_file_names_versions(ltmp, capsys):
    assert ltmp("info") == 0
    assert f"torch: {torch.__version__}" in capsys.readouterr().out


def test_json_on_screen_is_all_there_is(ltmp, images, tmp_path, capsys):
    file = tmp_path / "off.safetensors"
    learn_nothing(file)
    capsys.readouterr()
    assert ltmp("eval", "--data", images, "--thresholds", file, "--json", "-", "--no-speed", "--limit", 4) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 4


def learn_nothing(path) -> None:
    """A thresholds file of three blocks that selects nothing."""
    import timm

    from .conftest import NAME, SHAPE

    package.save(package.attach(timm.create_model(NAME, img_size=32, num_classes=3, **SHAPE)), path, architecture=NAME)


def test_model_name_comes_from_the_thresholds(images, weights, tmp_path):
    from .conftest import MODEL

    file = tmp_path / "off.safetensors"
    learn_nothing(file)
    assert main(["eval", *MODEL[2:], "--weights", str(weights), "--thresholds", str(file), "--data", str(images)]) == 0


def test_broken_image_is_counted_or_refused(ltmp, images, tmp_path, capsys):
    (images / "val" / "bee" / "1.png").write_bytes(b"")
    file = tmp_path / "off.safetensors"
    learn_nothing(file)
    assert ltmp("eval", "--data", images, "--thresholds", file, "--json", tmp_path / "r.json") == 0
    assert "unreadable images skipped: 1" in capsys.readouterr().err.replace("\n", " ")
    values = json.loads((tmp_path / "r.json").read_text())
    assert (values["images"], values["skipped"]) == (5, 1)
    assert ltmp("eval", "--data", images, "--thresholds", file, "--strict") == 1
    assert "bee/1.png" in error(capsys)


def test_unlabelled_images_are_learned_from_by_distillation(ltmp, images, tmp_path):
    flat = images / "train" / "ant"
    out = tmp_path / "run"
    assert ltmp("learn", "--data", flat, "--out", out, *LEARN, "--json", out / "learn.json") == 0
    assert "top1" not in json.loads((out / "learn.json").read_text())


def test_interrupted_run_resumes_to_the_same_thresholds(ltmp, images, tmp_path, monkeypatch, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert ltmp("learn", "--data", images, "--out", whole, *LEARN) == 0

    learn = package.learning.learn

    def stop_at_second_step(model, loader, *args, **kwargs):
        def watch(step):
            if step.step == 2:
                raise KeyboardInterrupt

        return learn(model, loader, *args, on_step=watch, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(package.learning, "learn", stop_at_second_step)
        assert ltmp("learn", "--data", images, "--out", broken, *LEARN) == 130
    assert "--resume" in error(capsys)
    assert ltmp("learn", "--data", images, "--out", broken, *LEARN) == 2
    assert "--resume" in error(capsys)
    assert ltmp("learn", "--data", images, "--out", broken, *LEARN, "--resume") == 0
    one, other = (package.checkpoint.read(folder / "thresholds.safetensors") for folder in (whole, broken))
    assert torch.equal(one.merge, other.merge)
    assert torch.equal(one.prune, other.prune)


@pytest.mark.parametrize("parts", ["norms", "lora"])
def test_a_tuned_model_is_written_beside_its_thresholds(ltmp, images, weights, tmp_path, capsys, parts):
    from .conftest import MODEL

    out = tmp_path / "run"
    assert ltmp("learn", "--data", images, "--out", out, *LEARN, "--tune", parts, "--json", out / "learn.json") == 0
    learned = json.loads((out / "learn.json").read_text())
    assert learned["weights"] == str(out / "model.safetensors")
    kept = learned["tuned"] == parts
    assert ("the model keeps the weights it had" in capsys.readouterr().err.replace("\n", " ")) == (not kept)
    assert {"top1", "top1_dense", "top1_dense_tuned"} <= learned.keys()
    before, after = (package.checkpoint.read_state_dict(file) for file in (weights, out / "model.safetensors"))
    assert {name: value.shape for name, value in after.items()} == {name: v.shape for name, v in before.items()}
    assert any(not torch.equal(value, before[name]) for name, value in after.items()) == kept
    own = ["--weights", str(out / "model.safetensors"), "--thresholds", str(out), "--data", str(images)]
    assert main(["eval", *MODEL, *own, "--json", str(tmp_path / "eval.json")]) == 0
    measured = json.loads((tmp_path / "eval.json").read_text())
    assert (measured["top1"], measured["share"]) == (learned["top1"], pytest.approx(learned["share"]))


def test_tuning_runs_one_epoch_and_puts_the_model_where_it_is_told(ltmp, images, tmp_path):
    out, file = tmp_path / "run", tmp_path / "tuned.safetensors"
    options = ["--batch-size", 3, "--target", 0.7, "--tune", "norms", "--tuned-weights", file]
    assert ltmp("learn", "--data", images, "--out", out, *options, "--json", out / "learn.json") == 0
    assert len(json.loads((out / "learn.json").read_text())["history"]) == 2
    assert file.exists()
    assert not (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["learn", "--target", "0.7"], 2, "'--data'"),
        (["learn", "--data", "DATA", "--tune", "heads"], 2, "knows no parts 'heads': choose one of norms, lora"),
        (["learn", "--data", "DATA", "--tune", "lora", "--lora-rank", "0"], 2, "rank"),
        (["learn", "--data", "DATA", "--tuned-weights", "x.safetensors"], 2, "add --tune norms or --tune lora"),
        (["learn", "--data", "DATA", "--tune-lr", "0.1"], 2, "--tune-lr is for a tuned model"),
        (["nonsense"], 2, "nonsense"),
        (["learn", "--data", "DATA", "--target", "1.5"], 2, "target is 1.5"),
        (["learn", "--data", "DATA", "--target", "0.01"], 2, "out of reach"),
        (["learn", "--data", "DATA", "--variant", "ltx"], 2, "ltmp, ltpm, ltm, ltp"),
        (["learn", "--data", "DATA", "--resume"], 2, "nothing to resume"),
        (["learn", "--data", "gone"], 2, "gone does not exist"),
        (["learn", "--data", "DATA", "--out", "file/run"], 1, "cannot write"),
        (["learn", "--data", "DATA", "--out", "file"], 1, "cannot write file"),
        (["learn", "--data", "DATA", "--json", "file/result.json"], 1, "cannot write file/result.json"),
        (["learn", "--data", "DATA", "--lr", "1e20"], 2, "--lr"),
        (["learn", "--data", "DATA", "--tau", "0"], 2, "--tau is 0: expected a number above 0 and at most 100"),
        (["learn", "--data", "DATA", "--interpolation", "bogus"], 2, "expected one of nearest, bilinear, bicubic"),
        (["learn", "--data", "DATA", "--std", "0", "0", "0"], 2, "std is 0.0, expected a number from 1e-06"),
        (["learn", "--data", "DATA", "--batch-size", "9" * 20], 2, "'--batch-size'"),
        (["compare", "--data", "DATA", "--thresholds", "x", "--learn-data", "gone"], 2, "--learn-data is for methods"),
        (["eval", "--data", "DATA", "--thresholds", "x", "--csv", "."], 1, "cannot write .: it is a folder"),
        (["learn", "--data", "DATA", "--device", "cuda:99"], 2, "cuda:99"),
        (["learn", "--data", "DATA", "--device", "tpux"], 2, "tpux"),
        (["learn", "--data", "DATA", "--model-kwargs", "depth"], 2, "NAME=VALUE"),
        (["learn", "--data", "DATA", "--num-classes", "5"], 1, "--num-classes 3"),
        (["learn", "--data", "DATA", "--model", "vit_tinny_patch16_224"], 2, "vit_tiny_patch16_224"),
        (["learn", "--data", "DATA", "--weights", "gone.safetensors"], 2, "gone.safetensors"),
        (["eval", "--data", "DATA", "--thresholds", "gone.safetensors"], 2, "gone.safetensors"),
        (["show", "gone.jpg", "--thresholds", "gone.safetensors"], 2, "gone.jpg"),
        (["report", "gone.json"], 2, "gone.json"),
        (["predict", "gone", "--out", "x", "--thresholds", "gone.safetensors"], 2, "gone.safetensors"),
        (["info", "gone.safetensors"], 2, "gone.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_said_in_one_line(arguments, code, expected, ltmp, images, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert ltmp(*(str(images) if word == "DATA" else word for word in arguments)) == code
    assert expected in error(capsys)


def test_weights_must_be_named(images, capsys):
    assert main(["learn", "--data", str(images), "--model", "vit_tiny_patch16_224"]) == 2
    assert "--weights" in error(capsys)


def test_class_count_must_match_the_head(ltmp, images, tmp_path, capsys):
    (images / "train" / "dog").mkdir()
    (images / "train" / "ant" / "0.png").rename(images / "train" / "dog" / "0.png")
    assert ltmp("learn", "--data", images) == 1
    assert "4 classes but the model's head has 3" in error(capsys)


def test_traceback_only_with_debug(ltmp, tmp_path, capsys):
    ltmp("info", tmp_path / "gone.safetensors")
    assert "Traceback" not in capsys.readouterr().err
    ltmp("info", tmp_path / "gone.safetensors", "--debug")
    assert "Traceback" in capsys.readouterr().err


def test_unexpected_error_is_one_line_too(monkeypatch, capsys):
    def fail():
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr("ltmp.evaluate.describe_machine", fail)
    assert main(["info"]) == 1
    assert error(capsys) == "error: ZeroDivisionError: by zero (add --debug for the traceback)"


def test_missing_typer_names_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    assert main(["info"]) == 1
    assert "pip install 'ltmp[cli]'" in error(capsys)


@pytest.mark.parametrize("verb", ["learn", "eval", "bench", "export", "demo", "info"])
def test_help_teaches(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "Usage: ltmp" in capsys.readouterr().out


def test_installed_command_reports_its_version():
    done = subprocess.run([sys.executable, "-m", "ltmp", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"ltmp {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["lern"], 2),
        (["learn", "--help"], 0),
        (["learn", "--dta", "x"], 2),
        (["predict", "images"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_quick_answers_import_no_torch(arguments, code):
    script = (
        f"import sys; from ltmp.cli import main; assert main({arguments}) == {code}; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HALF_BUILT = """
import signal, sys, time
from ltmp import cli

# ignored in what a shell starts in the background
signal.signal(signal.SIGINT, signal.default_int_handler)

class Thing:
    def __init__(self):
        {moment}
        self.name = "built"
    def __del__(self):
        {later}
        print("thrown away", self.name)

def work(arguments):
    Thing()
    for _ in range(1000):
        time.sleep(0.01)
    return 0

cli._run = work
sys.exit(cli.main({arguments}))
"""


@pytest.mark.parametrize(
    ("moment", "later", "arguments"),
    [
        ("raise KeyboardInterrupt", "pass", []),
        ("pass", "raise KeyboardInterrupt", []),
        ("raise KeyboardInterrupt", "pass", ["--debug"]),
    ],
    ids=["in a constructor", "forgotten by Python", "with --debug"],
)
def test_ctrl_c_at_any_moment_is_one_line(moment, later, arguments):
    script = HALF_BUILT.format(moment=moment, later=later, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 130
    if arguments:
        assert "has no attribute 'name'" in done.stderr
    else:
        assert done.stderr == "error: interrupted\n"


def test_other_complaints_reach_whoever_listens(monkeypatch):
    class Broken:
        def __del__(self):
            raise ValueError("while thrown away")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda complaint: told.append(str(complaint.exc_value)))
    before = sys.unraisablehook
    monkeypatch.setattr("ltmp.cli._run", lambda _: 0 if Broken() else 1)
    assert main([]) == 0
    assert told == ["while thrown away"]
    assert sys.unraisablehook is before


def test_who_has_read_enough_is_told_nothing():
    script = "import sys; from ltmp import cli; cli._run = lambda _: print('x' * 10**6); sys.exit(cli.main([]))"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(30), process.stderr.read()) == (1, b"")
    process.stderr.close()


def test_other_pipes_that_break_are_told(monkeypatch, capsys):
    def broken(arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("ltmp.cli._run", broken)
    assert main([]) == 1
    assert "BrokenPipeError: [Errno 32] Broken pipe" in error(capsys)
    assert not sys.stderr.closed


def test_a_typo_is_answered_with_what_it_may_mean(capsys):
    assert main(["lern"]) == 2
    assert "Did you mean 'learn'" in error(capsys)


def test_model_kwargs_are_literals_or_words():
    parsed = parse_kwargs(["img_size=224 qk_norm=True", "global_pool=avg"])
    assert parsed == {"img_size": 224, "qk_norm": True, "global_pool": "avg"}
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_kwargs(["=3"])


def test_learning_logs_for_tensorboard(ltmp, images, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    assert ltmp("learn", "--data", images, "--out", tmp_path / "run", *LEARN, "--log", tmp_path / "log") == 0
    assert [file.name.partition(".")[0] for file in (tmp_path / "log").iterdir()] == ["events"]


@pytest.mark.parametrize("letters", [10, 10**6], ids=["at the end", "at once"])
def test_a_full_disk_behind_stdout_is_one_line(letters):
    script = (
        f"import sys; from ltmp import cli; cli._run = lambda _: print('x' * {letters}) or 0; sys.exit(cli.main([]))"
    )
    with open("/dev/full", "w") as stdout:
        done = subprocess.run([sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write the results: No space left on device; send them elsewhere\n"


def test_json_in_what_is_printed_to_is_all_there_is(tmp_path):
    with open(tmp_path / "out.json", "w") as stdout:
        script = "import sys; from ltmp.cli import main; sys.exit(main(['info', '--json', '/dev/stdout']))"
        subprocess.run([sys.executable, "-c", script], stdout=stdout, check=True)
    assert "torch" in json.loads((tmp_path / "out.json").read_text())
