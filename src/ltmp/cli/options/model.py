"""Which model: its name, its weights, and thresholds for it."""

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
        "timm model name, e.g. deit_small_patch16_224, or hf:NAME_OR_FOLDER of a Hugging Face classifier, "
        "torchvision:NAME, or open_clip:NAME/WEIGHTS.",
        MODEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How a model is built."""

    pretrained: Annotated[bool, option("Take timm's pretrained weights instead.", MODEL)] = False
    num_classes: Annotated[int | None, option("Classes of the model's head.", MODEL, within=CLASSES)] = None
    img_size: Annotated[
        int | None, option("Image size in pixels; default: the model's own.", MODEL, "--img-size", within=PIXELS)
    ] = None
    model_kwargs: Annotated[
        list[str] | None, option("More arguments of the model; may be repeated.", MODEL, metavar="NAME=VALUE")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(BuildOptions):
    """Which weights, and what else is known of the model."""

    weights: Annotated[Path | None, option("Checkpoint of the model (.safetensors, .pth, .pth.tar).", MODEL)] = None

    @property
    def source(self) -> Path | None:
        """The thresholds, or the first of several: a file says more of its model. None where there are none."""
        found = getattr(self, "thresholds", None)
        first = (found[0] if found else None) if isinstance(found, list) else found
        return None if first is None else Path(first)

    def opened(self, budget: float | None = None) -> Bundle:
        """The metadata of the thresholds file's model, and the weights beside it."""
        from ...bundle import Bundle
        from ...checkpoint.metadata import Metadata

        return Bundle("", Metadata()) if self.source is None else Bundle.open(self.source, budget=budget)

    def again(self, thresholds: Path | None, weights: Path | None = None) -> list[object]:
        """How the next verb gets this model: the thresholds' file says the rest.

        Args:
            weights: those that were tuned, in place of the model's own.
        """
        from ...zoo.build import brings_weights

        words: list[object] = [] if thresholds is None else ["--thresholds", thresholds]
        name: str | None = getattr(self, "model", None)
        if weights is not None and weights.is_dir():
            return [*words, "--model", f"hf:{weights}"]
        if name is not None and (thresholds is None or brings_weights(name)):
            words += ["--model", name]
        given = weights or self.weights
        return [*words, *(["--weights", given] if given else ["--pretrained"] if self.pretrained else [])]

    def deploy(self, thresholds: Path, weights: Path | None = None, budget: float | None = None) -> list[object]:
        """The command that comes after thresholds are known to be good: pack them, or serve what is packed."""
        at: list[object] = [] if budget is None else ["--budget", f"{budget:g}"]
        if (thresholds / BUNDLE).is_file():
            return ["ltmp", "serve", *self.again(thresholds, weights), *at]
        folder = thresholds.parent if thresholds.is_file() else thresholds
        return ["ltmp", "pack", folder / "bundle", *self.again(thresholds, weights), *at]

    def has_weights(self, name: str, bundle: Bundle) -> bool:
        """Whether the model gets weights of its own, or else random ones."""
        from ...zoo.build import brings_weights

        given = self.weights is not None or self.pretrained or brings_weights(name)
        return given or bundle.weights is not None

    def build(
        self, name: str, *, budget: float | None = None, random: bool = False, classifier: bool = True
    ) -> nn.Module:
        """The model, with weights unless `random` ones will do: thresholds of a random model would mean nothing.

        Args:
            budget: which of several thresholds files in a folder to ask about it.
            classifier: whether it must be one.
        """
        bundle = self.opened(budget)
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
    """A model by its name."""

    model: Name


@dataclass(frozen=True, kw_only=True)
class SavedModel(ModelOptions):
    """A model that a thresholds file knows the name of."""

    model: Annotated[str | None, option("timm model name; default: the one in the thresholds file.", MODEL)] = None


@dataclass(frozen=True, kw_only=True)
class ReducedModel(SavedModel):
    """A model and its thresholds."""

    thresholds: Annotated[Path, option("What `ltmp pack` or `ltmp learn` wrote: the folder, the file, or USER/REPO.")]

    def name(self, budget: float | None = None) -> str:
        """The model's name; refuses a budget that the thresholds cannot be set to."""
        return self.model or name_in(self.thresholds, budget)


@dataclass(frozen=True, kw_only=True)
class AgainstOptions:
    """Another model to compare with, such as a smaller one."""

    against: Annotated[
        str | None, option("A smaller model to compare with, a name like --model; it takes the same images.", MODEL)
    ] = None
    against_weights: Annotated[Path | None, option("Its checkpoint; default: like those of --model.", MODEL)] = None

    def baselines(
        self, network: nn.Module, images: Tensor, sizes: Iterable[int] = (), *, pretrained: bool = False
    ) -> list[Baseline]:
        """Dense models to compare the attached `network` with: itself at lower resolutions, and the one asked for.

        Args:
            images: [B, C, H, W] on its device, one is enough. sizes: pixels a side.
            pretrained: take timm's weights where no file is given; random ones otherwise.
        """
        from ...evaluate.baselines import at_resolution, instead_of

        found = [at_resolution(network, size, images) for size in sizes]
        if self.against is None:
            if self.against_weights is not None:
                raise UsageError("--against-weights is for the model of --against: give both")
            return found
        return [*found, instead_of(network, self._built(network, images, pretrained), self.against, images)]

    def _built(self, network: nn.Module, images: Tensor, pretrained: bool) -> nn.Module:
        """The other model, with a head and a place like those of `network`."""
        import torch

        from ...hosts.outputs import logits_of
        from ...zoo.build import build_model

        with torch.inference_mode():
            classes = logits_of(network(images[:1])).shape[-1]
        other = build_model(
            self.against or "", weights=self.against_weights, num_classes=classes,
            pretrained=pretrained and self.against_weights is None, image_size=images.shape[-1],
        )  # fmt: skip
        return other.to(images.device, images.dtype).eval()


def name_in(thresholds: Path, budget: float | None = None) -> str:
    """The model that a thresholds file says it is for; refuses a budget that it cannot be set to."""
    from ...bundle import Bundle

    name = Bundle.open(thresholds, budget=budget).name
    if name is None:
        raise UsageError(f"{thresholds} does not say which model it is for: give --model NAME")
    return name


def parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """`["img_size=224 qk_norm=True"]` as a dict; values are Python literals, or else strings."""
    found = {}
    for pair in " ".join(pairs).split():
        name, equals, text = pair.partition("=")
        if not (name.isidentifier() and equals and text):
            raise UsageError(f"--model-kwargs {pair!r}: expected NAME=VALUE, e.g. img_size=224")
        try:
            found[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[name] = text
    return found
