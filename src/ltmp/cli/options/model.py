"""Options for the model: its name, its weights, and thresholds for it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import UsageError
from ...locate import BUNDLE
from ...ranges import CLASSES, PIXELS
from .groups import MODEL, option

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ...bundle import Bundle
    from ...evaluate.baselines import Baseline

Name = Annotated[
    str,
    option(
        "timm model name, e.g. deit_small_patch16_224; or hf:NAME_OR_FOLDER for a Hugging Face classifier, "
        "torchvision:NAME, or open_clip:NAME/WEIGHTS.",
        MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a model is built."""

    pretrained: Annotated[bool, option("Use timm's pretrained weights instead of a checkpoint.", MODEL)] = False
    num_classes: Annotated[
        int | None, option("Number of classes of the head; default: the model's own.", MODEL, within=CLASSES)
    ] = None
    img_size: Annotated[
        int | None, option("Image size in pixels; default: the model's own.", MODEL, "--img-size", within=PIXELS)
    ] = None
    model_kwargs: Annotated[
        list[str] | None,
        option("Further keyword argument of the model, such as depth=6; may be repeated.", MODEL, metavar="NAME=VALUE"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BuildOptions):
    """The weights of a model. A verb that takes thresholds adds a field `thresholds`, which may describe the model."""

    weights: Annotated[Path | None, option("Checkpoint of the model (.safetensors, .pth or .pth.tar).", MODEL)] = None

    @property
    def source(self) -> Path | None:
        """The thresholds file that describes the model, the first if there are several; None without one."""
        thresholds = getattr(self, "thresholds", None)
        first = (thresholds[0] if thresholds else None) if isinstance(thresholds, list) else thresholds
        return None if first is None else Path(first)

    def bundle(self, budget: float | None = None) -> Bundle:
        """What the thresholds file records about its model, with the weights beside it; empty without a file.

        Args:
            budget: selects one of several thresholds files in a folder.
        """
        from ...bundle import Bundle
        from ...checkpoint.metadata import Metadata

        return Bundle("", Metadata()) if self.source is None else Bundle.open(self.source, budget=budget)

    def arguments_for(self, thresholds: Path | None, weights: Path | None = None) -> list[object]:
        """Command-line arguments with which another verb gets this model, without what the thresholds file records.

        Args:
            weights: tuned weights, which replace the model's own; a folder holds a Hugging Face model.
        """
        from ...zoo.build import includes_weights

        arguments: list[object] = [] if thresholds is None else ["--thresholds", thresholds]
        name: str | None = getattr(self, "model", None)
        if weights is not None and weights.is_dir():
            return [*arguments, "--model", f"hf:{weights}"]
        if name is not None and (thresholds is None or includes_weights(name)):
            arguments += ["--model", name]
        checkpoint = weights or self.weights
        if checkpoint:
            arguments += ["--weights", checkpoint]
        elif self.pretrained:
            arguments += ["--pretrained"]
        return arguments

    def deploy_command(
        self, thresholds: Path, weights: Path | None = None, budget: float | None = None
    ) -> list[object]:
        """The command that deploys thresholds: `ltmp pack`, or `ltmp serve` if they are packed already."""
        arguments = self.arguments_for(thresholds, weights)
        if budget is not None:
            arguments += ["--budget", f"{budget:g}"]
        if (thresholds / BUNDLE).is_file():
            return ["ltmp", "serve", *arguments]
        folder = thresholds.parent if thresholds.is_file() else thresholds
        return ["ltmp", "pack", folder / "bundle", *arguments]

    def has_weights(self, name: str, bundle: Bundle) -> bool:
        """Whether there are weights for the model; without any it would get random ones."""
        from ...zoo.build import includes_weights

        return self.weights is not None or self.pretrained or includes_weights(name) or bundle.weights is not None

    def build(
        self, name: str, *, budget: float | None = None, random: bool = False, classifier: bool = True
    ) -> nn.Module:
        """Build the model.

        Args:
            budget: selects one of several thresholds files in a folder.
            random: accept random weights. They are an error otherwise: thresholds for them would mean nothing.
            classifier: whether the model must be a classifier.
        """
        bundle = self.bundle(budget)
        if not (random or self.has_weights(name, bundle)):
            raise UsageError("which weights? give --weights FILE, or --pretrained for timm's own")
        return bundle.build(
            name,
            weights=self.weights,
            pretrained=self.pretrained,
            num_classes=self.num_classes,
            image_size=self.img_size,
            model_kwargs=parse_kwargs(self.model_kwargs or ()),
            classifier=classifier,
        )


@dataclass(frozen=True, kw_only=True)
class NamedModel(ModelOptions):
    """A model that must be named."""

    model: Name


@dataclass(frozen=True, kw_only=True)
class SavedModel(ModelOptions):
    """A model whose name may come from the thresholds file."""

    model: Annotated[
        str | None,
        option("timm model name, hf:..., torchvision:... or open_clip:...; default: from the thresholds file.", MODEL),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReducedModel(SavedModel):
    """A model and its thresholds."""

    thresholds: Annotated[
        Path,
        option(
            "Folder or file written by `ltmp dial`, `ltmp learn` or `ltmp pack`, or USER/REPO on the Hugging Face Hub."
        ),
    ]

    def name(self, budget: float | None = None) -> str:
        """The model's name.

        Raises:
            UsageError: the name is not known, or the thresholds cannot be set to this budget.
        """
        return self.model or name_in(self.thresholds, budget)


@dataclass(frozen=True, kw_only=True)
class AgainstOptions:
    """A dense baseline, such as a smaller model."""

    against: Annotated[
        str | None,
        option("Name of another dense model to compare with, such as a smaller one, on the same images.", MODEL),
    ] = None
    against_weights: Annotated[
        Path | None, option("Checkpoint of the --against model; default: timm's weights with --pretrained.", MODEL)
    ] = None

    def baselines(
        self, network: nn.Module, images: Tensor, sizes: Iterable[int] = (), *, pretrained: bool = False
    ) -> list[Baseline]:
        """Dense baselines for the attached `network`: itself at lower resolutions, and the --against model.

        Args:
            images: [B, C, H, W] on the network's device; one image is enough.
            sizes: resolutions, as pixels per side.
            pretrained: whether the --against model gets timm's weights if it has no checkpoint, instead of random ones.
        """
        from ...evaluate.baselines import as_baseline, at_resolution

        baselines = [at_resolution(network, size, images) for size in sizes]
        if self.against is None:
            if self.against_weights is not None:
                raise UsageError("--against-weights is for the model of --against: give both")
            return baselines
        other = self._build_against(self.against, network, images, pretrained)
        return [*baselines, as_baseline(network, other, self.against, images)]

    def _build_against(self, name: str, network: nn.Module, images: Tensor, pretrained: bool) -> nn.Module:
        """Build the --against model with as many classes as `network`, on the device and in the dtype of `images`."""
        import torch

        from ...hosts.outputs import logits_of
        from ...zoo.build import build_model

        with torch.inference_mode():
            classes = logits_of(network(images[:1])).shape[-1]
        other = build_model(
            name, weights=self.against_weights, num_classes=classes,
            pretrained=pretrained and self.against_weights is None, image_size=images.shape[-1],
        )  # fmt: skip
        return other.to(images.device, images.dtype).eval()


def name_in(thresholds: Path, budget: float | None = None) -> str:
    """The model name in a thresholds file.

    Raises:
        UsageError: the file records no name, or cannot be set to this budget.
    """
    from ...bundle import Bundle

    name = Bundle.open(thresholds, budget=budget).name
    if name is None:
        raise UsageError(f"{thresholds} does not say which model it is for: give --model NAME")
    return name


def parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `["img_size=224 qk_norm=True"]` into a dict; a value that is not a Python literal is a string."""
    kwargs = {}
    for pair in " ".join(pairs).split():
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals and text):
            raise UsageError(f"--model-kwargs {pair!r}: expected NAME=VALUE, e.g. img_size=224")
        try:
            kwargs[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            kwargs[name] = text
    return kwargs
