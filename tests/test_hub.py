"""Thresholds go to a hub and come back, from it or from its cache, with a card that says what is known."""

from __future__ import annotations

import json
from dataclasses import asdict

import huggingface_hub
import pytest
import timm
import torch
import yaml

import ltmp
from helpers import attach_reducing, make_dial, random_images, tiny_vit
from hub_stub import TOKEN, local_hub
from ltmp.checkpoint import annotate, read
from ltmp.cli import main
from ltmp.errors import LTMPError, UsageError
from ltmp.evaluate import evaluate
from ltmp.hosts.attach import thresholds_of
from ltmp.hub import END, START, card, measured
from ltmp.locate import locate

REPO = "me/tiny-ltmp"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of its own with an empty cache, and somebody who is logged in."""
    with local_hub() as hub:
        use(hub.url, monkeypatch)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.chdir(tmp_path)
        yield hub


def use(endpoint: str, monkeypatch) -> None:
    """What HF_ENDPOINT does, which is read when huggingface_hub is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def reduced():
    return attach_reducing(tiny_vit(), random_images(8))


def front_matter(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def same_thresholds(a, b) -> bool:
    ours, theirs = thresholds_of(a), thresholds_of(b)
    return torch.equal(ours.merge, theirs.merge) and torch.equal(ours.prune, theirs.prune)


def test_a_model_goes_there_and_back(hub, reduced):
    url = ltmp.push_to_hub(reduced, REPO, target=0.6, share=0.61)
    assert url == f"{hub.url}/{REPO}"
    assert sorted(hub.files[REPO]) == ["README.md", "thresholds-0.6.safetensors"]
    fresh = ltmp.from_pretrained(REPO, tiny_vit())
    assert same_thresholds(fresh, reduced)
    images = random_images(3)
    assert torch.equal(fresh(images), reduced(images))
    again = tiny_vit()
    assert ltmp.load(again, REPO).metadata["target"] == 0.6
    assert same_thresholds(again, reduced)


def test_several_budgets_in_one_repository(hub, reduced):
    for budget in (0.6, 0.45):
        thresholds_of(reduced).set(merge=[budget] * 3)
        ltmp.push_to_hub(reduced, REPO, target=budget)
    assert sorted(hub.files[REPO]) == ["README.md", "thresholds-0.45.safetensors", "thresholds-0.6.safetensors"]
    model = ltmp.from_pretrained(REPO, tiny_vit(), budget=0.45)
    assert thresholds_of(model).merge.tolist() == pytest.approx([0.45] * 3)
    named = ltmp.load(tiny_vit(), f"hf-hub:{REPO}@main/thresholds-0.6.safetensors")
    assert named.merge.tolist() == pytest.approx([0.6] * 3)
    with pytest.raises(UsageError, match=r"several thresholds \(thresholds-0.45.* hf-hub:me/tiny-ltmp/thresholds-0.45"):
        ltmp.load(tiny_vit(), REPO)
    with pytest.raises(UsageError, match=r"no thresholds-0.5.safetensors among its thresholds \(thresholds-0.45"):
        ltmp.from_pretrained(REPO, tiny_vit(), budget=0.5)
    text = hub.files[REPO]["README.md"].decode()
    assert text.count("| thresholds-0.") == 2
    assert 'from_pretrained("me/tiny-ltmp", model, budget=0.45)' in text


def test_a_dial_beside_single_budgets(hub, reduced):
    ltmp.push_to_hub(reduced, REPO, target=0.6)
    reduced.ltmp.set_dial(make_dial(3))
    reduced.ltmp.set_budget(0.5)
    ltmp.push_to_hub(reduced, REPO, budget=0.7)
    assert sorted(hub.files[REPO]) == ["README.md", "thresholds-0.6.safetensors", "thresholds-dial.safetensors"]
    for budget, dialled in ((0.6, False), (0.45, True)):
        model = ltmp.from_pretrained(REPO, tiny_vit(), budget=budget)
        assert (model.ltmp.dial is not None) is dialled
        assert model.ltmp.budget == (budget if dialled else None)
    text = hub.files[REPO]["README.md"].decode()
    assert "| 0.3 to 0.95 | 0.700 |" in text
    named = ltmp.load(tiny_vit(), f"hf-hub:{REPO}/thresholds-dial.safetensors")
    assert torch.equal(named.merge, make_dial(3).at(0.7)[0])
    with pytest.raises(UsageError, match=r"goes from 0\.3 to 0\.95"):
        ltmp.from_pretrained(REPO, tiny_vit(), budget=0.1)


def test_the_card_of_a_dial_says_how_to_turn_it(hub, reduced):
    reduced.ltmp.set_dial(make_dial(3))
    ltmp.push_to_hub(reduced, REPO, base_model="timm/tiny")
    text = hub.files[REPO]["README.md"].decode()
    assert 'from_pretrained("me/tiny-ltmp", budget=0.62)' in text
    assert "model.ltmp.set_budget(0.3)" in text


def test_a_folder_with_one_file_and_a_budget(reduced, tmp_path):
    ltmp.save(reduced, tmp_path / "thresholds.safetensors", target=0.6)
    assert locate(tmp_path, budget=0.5) == tmp_path / "thresholds.safetensors"
    with pytest.raises(UsageError, match=r"the budget 0\.6 alone and no dial"):
        ltmp.from_pretrained(tmp_path, tiny_vit(), budget=0.5)
    (tmp_path / "thresholds.safetensors").rename(tmp_path / "thresholds-0.6.safetensors")
    ltmp.save(reduced, tmp_path / "thresholds-0.5.safetensors")
    assert same_thresholds(ltmp.from_pretrained(tmp_path, tiny_vit(), budget=0.5), reduced)


def test_the_card_says_what_was_measured(hub, reduced):
    batches = [(random_images(6), torch.arange(6) % 5)]
    evaluation = evaluate(reduced, batches)
    ltmp.push_to_hub(reduced, REPO, target=0.7, base_model="timm/tiny", evaluation=evaluation)
    text = hub.files[REPO]["README.md"].decode()
    front = front_matter(text)
    assert (front["library_name"], front["base_model"], front["metrics"]) == ("ltmp", "timm/tiny", ["accuracy"])
    assert {"ltmp", "token-merging", "token-pruning"} <= set(front["tags"])
    assert 'from_pretrained("me/tiny-ltmp")' in text
    header, _, row = (line for line in text.splitlines() if line.startswith("|"))
    cells = dict(zip(*(map(str.strip, line.strip("|").split("|")) for line in (header, row)), strict=True))
    assert (cells["file"], cells["budget"], cells["images"]) == ("thresholds-0.7.safetensors", "0.700", "6")
    assert float(cells["share"]) == pytest.approx(evaluation.share, abs=1e-3)
    assert float(cells["top-1"]) == pytest.approx(evaluation.top1, abs=0.1)
    assert float(cells["dense top-1"]) == pytest.approx(evaluation.dense_top1, abs=0.1)
    assert float(cells["speed-up"]) == pytest.approx(evaluation.throughput.speedup, abs=0.1)
    # the file says it, too, so that the next push can
    file = read(REPO).metadata
    assert (file["top1"], file["speed"]["batch_size"]) == (evaluation.top1, 6)


def test_the_card_invents_nothing(hub, reduced):
    ltmp.push_to_hub(reduced, REPO)
    assert sorted(hub.files[REPO]) == ["README.md", "thresholds.safetensors"]
    text = hub.files[REPO]["README.md"].decode()
    front = front_matter(text)
    assert not {"base_model", "metrics", "datasets", "license", "model-index"} & front.keys()
    header = next(line for line in text.splitlines() if line.startswith("| file"))
    assert header == "| file | input |"


def test_what_people_wrote_into_the_card_stays(hub, reduced):
    ltmp.push_to_hub(reduced, REPO, target=0.6)
    text = hub.files[REPO]["README.md"].decode()
    mine = text.replace("---\n", "---\nlicense: mit\n", 1).replace(START, f"Mine.\n\n{START}") + "\nMore of mine.\n"
    hub.files[REPO]["README.md"] = mine.encode()
    hub.commits.append({})
    ltmp.push_to_hub(reduced, REPO, target=0.5)
    after = hub.files[REPO]["README.md"].decode()
    assert front_matter(after)["license"] == "mit"
    assert after.index("Mine.") < after.index(START) < after.index("thresholds-0.5") < after.index(END)
    assert after.index(END) < after.index("More of mine.")
    assert after.count(START) == after.count(END) == 1


def test_a_card_without_our_part_gets_one():
    text = card("me/x", {"thresholds.safetensors": {"target": 0.5}}, "# Only mine\n")
    assert text.index("# Only mine") < text.index(START) < text.index(END)


def test_cards_are_stable():
    files = {"thresholds-0.5.safetensors": {"target": 0.5, "top1": 70.0}}
    once = card("me/x", files)
    assert card("me/x", files, once) == once


def test_offline_the_cache_is_enough(hub, reduced, monkeypatch):
    ltmp.push_to_hub(reduced, REPO, target=0.6)
    ltmp.load(tiny_vit(), REPO)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = len(hub.requests)
    assert same_thresholds(ltmp.from_pretrained(REPO, tiny_vit(), budget=0.6), reduced)
    assert len(hub.requests) == before


def test_offline_and_not_in_the_cache(hub, offline):
    with pytest.raises(
        LTMPError, match=r"me/none is neither a local path nor in the cache.*connect, or copy"
    ) as refusal:
        ltmp.load(tiny_vit(), "me/none")
    assert "\n" not in str(refusal.value)


def test_no_network(hub, monkeypatch, reduced):
    use("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(LTMPError, match=r"me/none.*(connect|cannot be reached)") as refusal:
        ltmp.load(tiny_vit(), "me/none")
    assert "\n" not in str(refusal.value)
    with pytest.raises(LTMPError, match="connect first") as refusal:
        ltmp.push_to_hub(reduced, REPO)
    assert "\n" not in str(refusal.value)


def test_what_is_not_there_is_said(hub, reduced):
    with pytest.raises(LTMPError, match="me/none is neither a local path nor a Hugging Face repository"):
        ltmp.load(tiny_vit(), "me/none")
    ltmp.push_to_hub(reduced, REPO)
    with pytest.raises(LTMPError, match="has no such revision"):
        ltmp.load(tiny_vit(), f"{REPO}@other")
    with pytest.raises(LTMPError, match=r"has no file thresholds-9.safetensors"):
        ltmp.load(tiny_vit(), f"hf-hub:{REPO}/thresholds-9.safetensors")
    hub.files["me/empty"] = {"model.safetensors": b"x" * 100}
    with pytest.raises(UsageError, match=r"me/empty holds no thresholds\*.safetensors"):
        ltmp.load(tiny_vit(), "me/empty")
    assert not any("model.safetensors" in request for request in hub.requests)
    with pytest.raises(UsageError, match="expected hf-hub:USER/REPO"):
        ltmp.load(tiny_vit(), "hf-hub:me")


def test_without_a_login_nothing_is_pushed(hub, reduced, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    with pytest.raises(LTMPError, match="log in") as refusal:
        ltmp.push_to_hub(reduced, REPO)
    assert "\n" not in str(refusal.value)
    assert hub.files == {}


def test_only_thresholds_in_safetensors_are_shared(hub, reduced, tmp_path):
    torch.save({f"blocks.{i}.merge_masker.threshold": torch.tensor(0.9) for i in range(3)}, tmp_path / "seed.pth")
    with pytest.raises(LTMPError, match="is not safetensors"):
        ltmp.push_to_hub(tmp_path / "seed.pth", REPO)
    with pytest.raises(LTMPError, match="no thresholds file"):
        ltmp.push_to_hub(tmp_path / "none.safetensors", REPO)
    with pytest.raises(LTMPError, match="nothing is attached"):
        ltmp.push_to_hub(tiny_vit(), REPO)
    assert hub.requests == []


def test_a_private_repository(hub, reduced):
    ltmp.push_to_hub(reduced, REPO, private=True)
    assert hub.private[REPO]


def test_files_and_folders_are_found_without_a_hub(tmp_path, reduced, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    folder = tmp_path / "user" / "repo"
    ltmp.save(reduced, folder / "thresholds.safetensors")
    assert locate("user/repo").samefile(locate(folder))
    assert same_thresholds(ltmp.from_pretrained("user/repo", tiny_vit()), reduced)
    # a file's name is a file's, also where it is missing
    with pytest.raises(LTMPError, match=r"no thresholds file user/none.safetensors"):
        ltmp.load(tiny_vit(), "user/none.safetensors")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match="bare holds no thresholds"):
        ltmp.load(tiny_vit(), "bare")


def test_the_base_model_is_built(hub, tmp_path, monkeypatch):
    # at another size than its own, without a network for the weights
    model = ltmp.attach(timm.create_model("test_vit.r160_in1k", img_size=96).eval())
    ltmp.push_to_hub(model, REPO, base_model="timm/test_vit.r160_in1k", model_name="test_vit")
    torch.save(model.state_dict(), tmp_path / "w.pth")
    weights = tmp_path / "weights.pth"
    torch.save({key: value for key, value in model.state_dict().items() if not key.startswith("ltmp.")}, weights)
    built = ltmp.from_pretrained(REPO, weights=weights)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(built(images), model(images))
    asked = []
    monkeypatch.setattr("ltmp.bundle.build_model", lambda name, **how: asked.append((name, how)) or tiny_vit())
    with pytest.raises(LTMPError, match="was learned for"):
        ltmp.from_pretrained(REPO)
    how = {"weights": None, "pretrained": True, "num_classes": None, "image_size": 96, "model_kwargs": {}}
    how["classifier"] = True
    assert asked == [("test_vit.r160_in1k", how)]


def test_an_unknown_base_model_is_not_guessed(hub, reduced):
    ltmp.push_to_hub(reduced, REPO, model_name="deit_small_patch16_224")
    with pytest.raises(LTMPError, match="does not say whose weights"):
        ltmp.from_pretrained(REPO)


def test_evaluations_are_recognised(reduced):
    evaluation = evaluate(reduced, [(random_images(2), torch.tensor([0, 1]))], speed=False)
    assert measured(evaluation) == measured(json.loads(json.dumps(asdict(evaluation))))
    assert "speed" not in measured(evaluation)
    with pytest.raises(LTMPError, match="this is not an evaluation"):
        measured({"hello": 1})


def test_annotating_keeps_the_rest(reduced, tmp_path):
    ltmp.save(reduced, tmp_path / "a.safetensors", target=0.6)
    annotate(tmp_path / "a.safetensors", tmp_path / "b.safetensors", top1=70.0)
    a, b = read(tmp_path / "a.safetensors"), read(tmp_path / "b.safetensors")
    assert torch.equal(a.merge, b.merge)
    assert b.metadata == {**a.metadata, "top1": 70.0}
    assert a.config == b.config


def test_push_from_the_command_line(hub, reduced, tmp_path, capsys):
    ltmp.save(reduced, tmp_path / "run" / "thresholds.safetensors", target=0.6)
    (tmp_path / "result.json").write_text(json.dumps({"share": 0.61, "images": 10, "top1": 50.0, "dense_top1": 60.0}))
    push = ["push", str(tmp_path / "run"), REPO, "--evaluation", str(tmp_path / "result.json")]
    assert main([*push, "--base-model", "timm/tiny", "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/{REPO}\n"
    assert hub.private[REPO]
    assert main(["info", REPO, "--json", "-"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["top1_dense"], about["base_model"]) == (60.0, "timm/tiny")
    assert main(["push", str(tmp_path / "none.safetensors"), REPO]) == 2
    assert "no thresholds file" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("[]")
    assert main(push) == 2
    assert main(["push", str(tmp_path / "run"), "a/b/c"]) == 2
    assert "expected USER/REPO" in capsys.readouterr().err
