"""`ltmp app`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ...errors import LTMPError, UsageError, first_line
from ...ranges import BUDGET, Range
from ..extras import need
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


@dataclass(frozen=True, kw_only=True)
class AppModel(ModelOptions, CertifiedOption):
    """A model at one budget or several, or the demo's."""

    model: Annotated[str | None, option("timm model name, or hf:NAME_OR_FOLDER; default: the demo's.", MODEL)] = None
    thresholds: Annotated[
        list[Path] | None, option("A file that `ltmp learn` wrote; may be repeated, a budget each.")
    ] = None
    budget: Annotated[
        float | None,
        option("FLOPs share that the slider begins at; default: one in the middle.", metavar="SHARE", within=BUDGET),
    ] = None
    demo_out: Annotated[Path, option("Where `ltmp demo` wrote its model.")] = Path("ltmp-demo")
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class AppData(PreprocessingOptions):
    """Pictures to try, and what they may show."""

    images: Annotated[
        Path | None,
        option("Pictures to choose from and calibrate on; default: some photographs.", DATA, metavar="FOLDER"),
    ] = None
    class_names_file: Annotated[
        Path | None, option("Names of the model's classes, one a line (.txt).", DATA, "--class-names")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Where the page is."""

    host: Annotated[str, option("Address to listen on; 0.0.0.0 is everybody.")] = "127.0.0.1"
    port: Annotated[int | None, option("Port; default: the first free one from 7860 on.", within=Range(1, 65_535))] = (
        None
    )
    browser: Annotated[bool, option("Open a browser.")] = False


@verb
def app_verb(model: AppModel, data: AppData, page: Page) -> None:
    """Open a page to try it: drop a picture, slide the budget, watch patches and answers change block by block.

    Without options, and offline, it shows DeiT-S on photographs where its weights were fetched before; else the demo's
    digits, for which a first start trains a small model in less than a minute.

    Example: ltmp app --thresholds runs/60/thresholds.safetensors --thresholds runs/50/thresholds.safetensors
    --pretrained --images photographs/

    With nothing at hand (fetches 88 MB): ltmp app --model deit_small_patch16_224 --pretrained
    """
    need("gradio", "matplotlib")
    from ...app import build_page, serving_options
    from ..screen import tell

    built = build_page(_explorer(model, data) if model.model or model.thresholds else _default(model, data))
    where = {"server_name": page.host, "server_port": page.port, "inbrowser": page.browser}
    try:
        built.launch(**serving_options(), **where, quiet=True, prevent_thread_lock=True)
    except OSError as error:
        raise LTMPError(f"cannot listen on {page.host}, port {page.port}: {first_line(error)}") from error
    tell(f"Open {built.local_url} in a browser; Ctrl-C stops.")
    built.block_thread()


def _default(model: AppModel, data: AppData) -> Explorer:
    """What is shown where no model is named."""
    from ...app.default import SHOWN, demo_explorer, shows_photographs
    from ..progress import progress_bar

    if model.weights or model.pretrained or data.images or model.budget is not None or model.certified:
        raise UsageError("for which model? give --model NAME or --thresholds FILE, or no options for the demo's")
    if shows_photographs(model.demo_out):
        return _explorer(replace(model, model=SHOWN, pretrained=True), data)
    return demo_explorer(model.demo_out, progress_bar)


def _explorer(model: AppModel, data: AppData) -> Explorer:
    """A model of one's own, with the pictures of a folder."""
    import torch

    from ...app import Budgets, Explorer
    from ...app.default import photographs
    from ...data import class_names, eval_transform, image_mode

    thresholds = model.thresholds or []
    network = model.build(model.model or name_in(thresholds[0])).to(pick_device(model.device))
    mode = image_mode(network)
    samples = _pictures(data.images, mode) if data.images else photographs(mode)
    transform = eval_transform(network, **data.transform)
    tensors = torch.stack([transform(image) for image in samples[:16]]) if samples else None
    tensors = None if tensors is None else tensors.to(next(network.parameters()))
    start = model.share(network, thresholds[0] if len(thresholds) == 1 else None, None, model.budget)
    budgets = Budgets.from_files(network, thresholds, tensors, start)
    names = class_names(network, None, data.class_names_file)
    return Explorer(network, budgets, classes=names, samples=samples, data_options=data.transform)


def _pictures(folder: Path, mode: str, most: int = 24) -> list[Image.Image]:
    """The first pictures of a folder, in the order of their names."""
    from ...data import read_image
    from ...data.folders import list_images
    from ...data.images import EXTENSIONS

    if not folder.is_dir():
        raise UsageError(f"no folder {folder}: --images takes a folder of pictures")
    files = [name for name, _ in list_images(folder).images]
    if not files:
        raise UsageError(f"{folder} holds no pictures: expected files that end in {', '.join(sorted(EXTENSIONS))}")
    return [read_image(folder / name, mode) for name in files[:most]]
