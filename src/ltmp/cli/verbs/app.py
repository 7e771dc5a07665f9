"""`ltmp app`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import LTMPError, UsageError, first_line
from ...ranges import BUDGET, Range
from ..extras import require
from ..options import (
    DATA,
    MODEL,
    CertifiedOption,
    Device,
    ModelOptions,
    PreprocessingOptions,
    name_in,
    option,
    pick_device,
    verb,
)

if TYPE_CHECKING:
    from PIL import Image

    from ...app import Explorer


MOST_IMAGES = 24


@dataclass(frozen=True, kw_only=True)
class AppModel(ModelOptions, CertifiedOption):
    """A model at one or several budgets, or the model of the demo."""

    model: Annotated[
        str | None,
        option(
            "timm model name or hf:NAME_OR_FOLDER; default: the one in the thresholds file, or the demo's model.", MODEL
        ),
    ] = None
    thresholds: Annotated[
        list[Path] | None,
        option("Folder or file written by `ltmp dial` or `ltmp learn`; may be repeated, one for each budget."),
    ] = None
    budget: Annotated[
        float | None,
        option("FLOPs share at which the slider starts; default: one in the middle.", metavar="SHARE", within=BUDGET),
    ] = None
    demo_out: Annotated[Path, option("Output folder of `ltmp demo`, whose model is shown by default.")] = Path(
        "ltmp-demo"
    )
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class AppData(PreprocessingOptions):
    """The images to offer, and class names."""

    images: Annotated[
        Path | None,
        option("Images to choose from and calibrate on; default: some photographs.", DATA, metavar="FOLDER"),
    ] = None
    class_names_file: Annotated[
        Path | None,
        option("Class names to show (.txt), one per line in the order of the model's outputs.", DATA, "--class-names"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """The address of the page."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0 makes the page reachable from other machines.")] = (
        "127.0.0.1"
    )
    port: Annotated[int | None, option("Port; default: the first free one from 7860 on.", within=Range(1, 65_535))] = (
        None
    )
    browser: Annotated[bool, option("Open the page in a browser.")] = False


@verb
def app_verb(model: AppModel, data: AppData, page: Page) -> None:
    """Open an interactive page: drop in an image, move the budget slider, watch patches and answers change by block.

    Without options, and offline, it shows the model that `ltmp demo` wrote; without one, DeiT-S on photographs if its
    weights are in the cache; otherwise the digits of the demo with a small model, trained in less than a minute.

    Example: ltmp app --thresholds runs/60/thresholds.safetensors --thresholds runs/50/thresholds.safetensors
    --pretrained --images photographs/

    Without any files (downloads 88 MB): ltmp app --model deit_small_patch16_224 --pretrained
    """
    require("gradio", "matplotlib")
    from ...app import build_page, serving_options
    from ..screen import print_note

    explorer = _explorer(model, data) if model.model or model.thresholds else _default_explorer(model, data)
    blocks = build_page(explorer)
    address = {"server_name": page.host, "server_port": page.port, "inbrowser": page.browser}
    try:
        blocks.launch(**serving_options(), **address, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise LTMPError(f"cannot listen on {page.host}, port {page.port}: {first_line(error)}") from error
    print_note(f"open {blocks.local_url} in a browser; Ctrl-C stops the app")
    blocks.block_thread()


def _default_explorer(model: AppModel, data: AppData) -> Explorer:
    """What is shown if neither a model nor thresholds are given."""
    from ...app.default import SHOWN, demo_explorer, shows_photographs
    from ..progress import progress_bar

    if model.weights or model.pretrained or data.images or model.budget is not None or model.certified:
        raise UsageError("for which model? give --model NAME or --thresholds FILE, or no options for the demo's")
    if shows_photographs(model.demo_out):
        return _explorer(replace(model, model=SHOWN, pretrained=True), data)
    return demo_explorer(model.demo_out, progress_bar)


def _explorer(model: AppModel, data: AppData) -> Explorer:
    """The given model, with the images of a folder or with photographs."""
    import torch

    from ...app import Budgets, Explorer
    from ...app.default import photographs
    from ...data import class_names, eval_transform, image_mode

    thresholds = model.thresholds or []
    network = model.build(model.model or name_in(thresholds[0])).to(pick_device(model.device))
    mode = image_mode(network)
    samples = _read_images(data.images, mode) if data.images else photographs(mode)
    transform = eval_transform(network, **data.transform)
    tensors = None
    if samples:
        tensors = torch.stack([transform(image) for image in samples[:16]]).to(next(network.parameters()))
    start = model.resolve_budget(network, thresholds[0] if len(thresholds) == 1 else None, None, model.budget)
    budgets = Budgets.from_files(network, thresholds, tensors, start)
    names = class_names(network, None, data.class_names_file)
    return Explorer(network, budgets, classes=names, samples=samples, data_options=data.transform)


def _read_images(folder: Path, mode: str) -> list[Image.Image]:
    """The first images of a folder, in the order of their names."""
    from ...data import read_image
    from ...data.folders import list_images
    from ...data.images import EXTENSIONS

    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: --images takes a folder of images")
    files = [name for name, _ in list_images(folder).images]
    if not files:
        raise UsageError(f"{folder} holds no images: expected files that end in {', '.join(sorted(EXTENSIONS))}")
    return [read_image(folder / name, mode) for name in files[:MOST_IMAGES]]
