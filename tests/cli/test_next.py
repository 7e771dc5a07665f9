"""Each verb ends with the command that comes next, which works as it is printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from ltmp.cli import main

LEARN = ("--views", "0", "--calibration", "4", "--batch-size", "2")


@pytest.fixture
def last_words(capsys):
    """The words of the command that the last verb ended with."""

    def read() -> list[str]:
        lines = capsys.readouterr().err.rstrip().splitlines()
        assert lines[-1].startswith("next: "), lines
        return shlex.split(lines[-1].removeprefix("next: "))

    return read


@pytest.fixture
def served(monkeypatch):
    """`ltmp serve` without anybody who asks."""
    monkeypatch.setattr("ltmp.serve.run", lambda app, bound=None, **_: bound and bound.close())


@pytest.mark.parametrize("verb", ["dial", "learn"])
def test_from_images_to_a_service_by_what_is_printed(ltmp, images, last_words, served, verb: str) -> None:
    more = ("--knots", "3") if verb == "dial" else ()
    assert ltmp(verb, "--data", images, *LEARN, *more, "--out", "my run") == 0
    pack = last_words()
    assert pack[:3] == ["ltmp", "pack", str(Path("my run") / "bundle")]
    assert main(pack[1:]) == 0
    serve = last_words()
    assert serve == ["ltmp", "serve", "--thresholds", pack[2]]
    assert main([*serve[1:], "--port", "0"]) == 0
    curl = last_words()
    assert curl[:3] == ["curl", "-F", "file=@cat.jpg"]
    # what is packed needs no packing
    assert main(["eval", "--data", str(images), "--thresholds", pack[2], "--no-speed"]) == 0
    assert last_words() == serve


def test_eval_repeats_weights_and_budget(ltmp, images, weights, last_words) -> None:
    assert ltmp("dial", "--data", images, *LEARN, "--knots", "3", "--no-eval", "--out", "run") == 0
    last_words()
    asked = ["--thresholds", "run", "--weights", str(weights), "--budget", "0.6"]
    assert main(["eval", "--data", str(images), "--no-speed", *asked]) == 0
    assert last_words() == ["ltmp", "pack", str(Path("run") / "bundle"), *asked]


def test_json_on_the_screen_comes_alone(ltmp, images, capsys) -> None:
    assert ltmp("dial", "--data", images, *LEARN, "--knots", "3", "--no-eval", "--out", "run", "--json", "-") == 0
    assert "next: " not in capsys.readouterr().err


def test_show_ends_with_the_app_on_the_same_pictures(ltmp, images, weights, last_words) -> None:
    assert ltmp("dial", "--data", images, *LEARN, "--knots", "3", "--no-eval", "--out", "run") == 0
    last_words()
    photograph = images / "val" / "ant" / "0.png"
    assert ltmp("show", photograph, "--thresholds", "run", "--budget", "0.6") == 0
    app = last_words()
    assert app[:2] == ["ltmp", "app"]
    assert app[-2:] == ["--images", str(photograph.parent)]
