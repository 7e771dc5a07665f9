"""Every command and every Python block of README and docs runs as it is written, page by page, in one folder.

Models keep their names but get narrow, random weights and large patches, and learning looks at few images; nothing else
of a block is changed but the paths in `ELSEWHERE`. What cannot run here is listed in `NOT_HERE`, with the reason.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import tarfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import ltmp
from ltmp.cli import main
from ltmp.data import make_loader, open_dataset
from ltmp.data.transforms import eval_transform
from ltmp.evaluate.costs import measure_costs

ROOT = Path(__file__).parents[2]
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
BLOCK = re.compile(r"```(bash|python)\n(.*?)```", re.DOTALL)

CLASSES, MANY = ("ant", "bee", "cow", "dog", "eel"), 200
NARROW: dict[str, dict[str, int]] = {
    "deit": {"embed_dim": 24, "num_heads": 3, "patch_size": 32},
    "vit": {"embed_dim": 24, "num_heads": 3},
}
"""What becomes of models whose names begin so."""
FEW = {
    "dial": ("--views 0", "--calibration 8", "--knots 3", "--limit 16"),
    "learn": ("--views 16", "--calibration 8", "--limit 16"),
    "compare": ("--budget 0.6", "--calibration 8", "--no-speed", "--limit 8"),
    "eval": ("--no-speed", "--limit 8"),
    "show": ("--width 48",),
}
"""Options that make a verb quick, where a page does not give them itself."""

ELSEWHERE = {"google/vit-base-patch16-224": "vit-base"}
"""Names on the pages that stand for a place that is not here."""

NOT_HERE = {
    "pip install": "installs packages",
    "make ": "builds an environment",
    "torchrun": "starts processes: tests/test_distributed.py",
    "tensorboard --logdir": "runs until it is stopped",
    "curl ": "asks a running service: tests/serve",
    "httpx": "asks a running service: tests/serve",
    "--runner ray": "starts a cluster: tests/predict",
    "ltmp push": "the Hugging Face Hub: tests/test_hub.py",
    "push_to_hub": "the Hugging Face Hub: tests/test_hub.py",
    "user/deit-small-ltmp": "the Hugging Face Hub: tests/test_hub.py",
    "laion2b_s34b_b79k": "weights of open_clip: tests/hosts",
    "compare ...": "an excerpt of a longer command: tests/cli/test_comparing.py",
    "ltmp bench": "times for a minute: tests/cli/test_benching.py",
    "ltmp export": "traces for a minute: tests/export, tests/cli/test_exporting.py",
    "ltmp.export": "traces for a minute: tests/export",
    "--engine onnx": "needs that export: tests/export",
    "onnxruntime": "needs that export: tests/export",
    'tokens="fewer"': "needs a vision-language model: tests/hosts/test_fewer.py",
    "LlavaForConditionalGeneration": "needs a vision-language model: tests/hosts/test_fewer.py",
    "processor(images=": "needs a vision-language model: tests/learning/test_answers.py",
    "DINOv3ViTModel": "needs weights of transformers: tests/hosts/test_towers.py",
    "DepthAnything": "needs weights of transformers: tests/hosts/test_towers.py",
    "at-most 0.01": "needs hundreds of images: tests/certification",
    "at_most=0.01": "needs hundreds of images: tests/certification",
}
"""Words of a command, or of a Python block, that is left out, and why."""


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of each block of a page."""
    return BLOCK.findall(PAGES[page].read_text())


def left_out(text: str) -> bool:
    return any(words in text for words in NOT_HERE)


def narrow(create: Any) -> Any:
    """timm's `create_model` with narrow models, few classes and random weights, the same each time."""

    def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        small = next((shape for start, shape in NARROW.items() if name.startswith(start)), None)
        if small is not None:
            kwargs = {**small, "num_classes": len(CLASSES), **kwargs}
        model = create(name, pretrained=False, **kwargs)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.15)
        return model

    return create_model


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    coarse = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((255 * coarse).byte().permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BICUBIC)


def write_images(folder: Path) -> None:
    """Everything that pages name: folders, tars, single photographs."""
    for s, split in enumerate(("train", "val")):
        for k, name in enumerate(CLASSES):
            place = folder / "imagenet" / split / name
            place.mkdir(parents=True)
            for i in range(3):
                picture(100 * s + 10 * k + i).save(place / f"{i}.jpg")
    shutil.copytree(folder / "imagenet" / "val", folder / "val")
    for name in ("images", "photographs"):
        shutil.copytree(folder / "imagenet" / "val" / "ant", folder / name)
    for k, name in enumerate(("cat", "dog")):
        picture(k, (120, 90)).save(folder / f"{name}.jpg")
    small = io.BytesIO()
    picture(0, (16, 16)).save(small, "PNG")
    for name in ("learn", "val"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for k in range(MANY):
                entry = tarfile.TarInfo(f"n{k:08d}/0.png")
                entry.size = len(small.getvalue())
                tar.addfile(entry, io.BytesIO(small.getvalue()))
    (folder / "names.txt").write_text("\n".join(CLASSES) + "\n")


def write_thresholds(folder: Path) -> None:
    """A dial, and thresholds for one budget each, of the same model, under the names that pages use."""
    model = ltmp.attach(timm.create_model("deit_small_patch16_224", pretrained=True).eval())
    data = open_dataset(str(folder / "imagenet"), split="train", transform=eval_transform(model))
    ltmp.learn_dial(model, make_loader(data, 8), calibration=8, views=0, knots=3, low=0.35, high=0.9)
    for run in ("deit", "dial"):
        ltmp.save(model, folder / "runs" / run / "thresholds.safetensors")
    ltmp.save(model, folder / "dial.safetensors")
    dial = model.ltmp.dial
    for share, names in {
        0.6: ("runs/deit-60/thresholds", "runs/60", "thresholds", "a"),
        0.5: ("runs/deit-50/thresholds", "b"),
        0.4: ("runs/40",),
        0.8: ("runs/80",),
    }.items():
        model.ltmp.set_dial(None)
        model.ltmp.set(*dial.at(share))
        for name in names:
            ltmp.save(model, folder / f"{name}.safetensors", share=share, model_name="deit_small_patch16_224")
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("ltmp.")}
    save_file(weights, folder / "mine.safetensors")
    other = timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=MANY)
    save_file(other.state_dict(), folder / "vit.safetensors")
    model = ltmp.attach(timm.create_model("vit_small_patch14_dinov2"))
    model.ltmp.set(*dial.at(0.6))
    ltmp.save(model, folder / "dinov2.safetensors")
    write_comparison(folder)


def write_comparison(folder: Path) -> None:
    """What `ltmp compare` would have left."""
    data = ["--data", str(folder / "val"), "--model", "deit_small_patch16_224", "--pretrained", "--no-speed"]
    done = main(["compare", *data, "--thresholds", str(folder / "a.safetensors"), "--out", str(folder / "compare")])
    assert done == 0


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("documented")
    with patch.object(timm, "create_model", narrow(timm.create_model)):
        write_images(folder)
        write_thresholds(folder)
        yield folder


@pytest.fixture
def here(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folder, with nothing that waits for requests."""
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "here"))
    pytest.importorskip("gradio")
    monkeypatch.setattr("gradio.Blocks.launch", lambda page, **_: None)
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda page: None)
    monkeypatch.setattr("ltmp.serve.run", lambda app, bound=None, **_: bound and bound.close())
    monkeypatch.setattr("ltmp.app.default.demo_explorer", lambda *_: explorer())
    monkeypatch.setitem(measure_costs.__kwdefaults__, "seconds", 0.001)
    return Path.cwd()


def explorer() -> Any:
    from ltmp.app import Budgets, Explorer

    model = timm.create_model("deit_small_patch16_224", pretrained=True).eval()
    return Explorer(model, Budgets.from_files(model, ["dial.safetensors"]), samples=[picture(0)], timed=False)


def names_of(page: str) -> dict[str, Any]:
    """What the Python blocks of a page take as given."""
    model = ltmp.attach(timm.create_model("deit_small_patch16_224", pretrained=True).eval())
    ltmp.load(model, "dial.safetensors", budget=0.6)
    data = open_dataset("imagenet", split="train", transform=eval_transform(model))
    given: dict[str, Any] = {"ltmp": ltmp, "timm": timm, "torch": torch, "model": model, "names": CLASSES}
    given |= {"loader": make_loader(data, 8), "images": torch.stack([data[i][0] for i in range(4)])}
    given |= {"labels": torch.arange(4), "criterion": torch.nn.functional.cross_entropy}
    if page == "transformers.md":
        write_classifier(Path("vit-base"))
        given |= {"clip": small_clip(), "tokenizer": tokens, "loader": [(torch.rand(4, 3, 32, 32), None)]}
    return given


def write_classifier(folder: Path) -> None:
    """What stands for a classifier of the Hub."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    config = ViTConfig(**shape, image_size=32, patch_size=4, num_labels=len(CLASSES), id2label=dict(enumerate(CLASSES)))
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def small_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 48}
    text = {**shape, "vocab_size": 50, "max_position_embeddings": 8, "eos_token_id": 2}
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config={**shape, "image_size": 32, "patch_size": 4}, projection_dim=16)
    )


def tokens(texts: Any, **_: Any) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding({"input_ids": torch.arange(4 * len(texts)).view(len(texts), 4)})


def commands(text: str) -> list[list[str]]:
    """Words of each command of a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if not left_out(line)]


def quick(words: list[str]) -> list[str]:
    """The arguments of `ltmp`, with fewer images."""
    program, verb, *rest = words
    assert program == "ltmp"
    more = [option.split() for option in FEW.get(verb, ())]
    return [verb, *rest, *(word for option in more if option[0] not in rest for word in option)]


def here_only(text: str) -> str:
    """A block with places that are here."""
    for place, other in ELSEWHERE.items():
        text = text.replace(place, other)
    return text


def learning(function: Any, **few: Any) -> Any:
    """A function that learns, from fewer images."""
    return lambda *args, **kwargs: function(*args, **{**kwargs, **few})


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_a_page_runs_as_written(page: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(ltmp, "learn", learning(ltmp.learn, views=16, calibration=8))
    monkeypatch.setattr(ltmp, "tune", learning(ltmp.tune, calibration=8))
    monkeypatch.setattr(ltmp, "learn_dial", learning(ltmp.learn_dial, views=0, calibration=8, knots=3))
    given = names_of(page)
    for language, text in blocks(page):
        if language == "bash":
            for words in filter(None, commands(here_only(text))):
                assert main(quick(words)) == 0, f"{shlex.join(words)}\n{capsys.readouterr().err[-2000:]}"
        elif not left_out(text):
            exec(compile(here_only(text), page, "exec"), given)


def test_what_is_left_out_is_on_the_pages() -> None:
    everything = "\n".join(text for page in PAGES for _, text in blocks(page))
    assert [words for words in (*NOT_HERE, *ELSEWHERE) if words not in everything] == []
