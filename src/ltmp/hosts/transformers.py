"""Recipes for vision encoders of Hugging Face transformers, version 5, alone and under their task heads.

The block functions are shared by all of them: `layouts` describes how each class of block names its parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTModel,
    PreTrainedModel,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    ViTForImageClassification,
    ViTMAEModel,
    ViTModel,
)

from ..engines.body import Body, running_body
from ..method.recipe import READS_TOKENS, Parts, Recipe, Rotary, activation_name, has_own_scale, linear_ratio
from .forward import BlockForward
from .layouts import LAYOUTS, Layout
from .pooling import log_size, sized_mean, without_prefix
from .rotary import rotary_rows, rotated
from .sizes import sizes_of

_LAYOUT_OF: dict[type, Layout] = {}
"""Cached layouts, by class of the block."""


def _layout(block: nn.Module) -> Layout:
    """Return the layout of a supported block."""
    cls = type(block)
    if cls not in _LAYOUT_OF:
        _LAYOUT_OF[cls] = next(layout for layout in LAYOUTS if layout.fits(block))
    return _LAYOUT_OF[cls]


def _apply(block: nn.Module, names: Iterable[str], x: Tensor) -> Tensor:
    """Apply modules of a block in order; a parameter among them is a scale."""
    for name in names:
        part = attrgetter(name)(block)
        x = part * x if isinstance(part, Tensor) else part(x)
    return x


def _heads(attention: Any) -> int:
    return int(getattr(attention, "num_heads", None) or attention.num_attention_heads)


def _qkv(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layout = _layout(block)
    x, attention = attrgetter(layout.norm)(block)(x), attrgetter(layout.attention)(block)
    projected = [attrgetter(name)(block)(x) for name in layout.qkv]
    q, k, v = projected if len(projected) == 3 else projected[0].chunk(3, -1)
    if layout.qk_norm:
        q, k = (attrgetter(name)(block)(t) for name, t in zip(layout.qk_norm, (q, k), strict=True))
    if getattr(attention, "q_bias", None) is not None:
        q, v = q + attention.q_bias, v + attention.v_bias
    q, k, v = (t.unflatten(-1, (_heads(attention), -1)) for t in (q, k, v))
    return q, k, v


def _out(block: nn.Module, y: Tensor) -> Tensor:
    return _apply(block, _layout(block).out, y)


def _attention(block: nn.Module) -> list[nn.Module]:
    layout = _layout(block)
    dropout = block.get_submodule(layout.attention)._modules.get("dropout")
    return [block.get_submodule(holder) for holder in layout.holders if holder] + ([] if dropout is None else [dropout])


def _mlp(block: nn.Module, x: Tensor) -> Tensor:
    return _apply(block, _layout(block).mlp, x)


def _mlp_ratio(block: nn.Module) -> float:
    norm, *layers = (attrgetter(name)(block) for name in _layout(block).mlp)
    return sum(linear_ratio(layer, len(norm.weight)) for layer in layers if isinstance(layer, nn.Module))


def _block_problem(block: nn.Module) -> str | None:
    """Return why this block cannot be reduced, or None if it can."""
    if not type(block).__module__.startswith("transformers.models."):
        return f"is a {type(block).__name__}, not a layer of transformers"
    layout = next((layout for layout in LAYOUTS if layout.fits(block)), None)
    if layout is None:
        return f"({type(block).__name__}) has parts that this version of ltmp does not support"
    attention, mlp = attrgetter(layout.attention)(block), attrgetter(layout.mlp[1])(block)
    if any(_is_patched(block.get_submodule(holder)) for holder in layout.holders):
        return "has forward hooks or a forward of its own, which would no longer run: remove them"
    if not type(mlp).__module__.startswith("transformers.models."):
        return f"has a {type(mlp).__name__}, which is not known to treat each token by itself"
    dropout = next((getattr(attention, name) for name in _DROPOUTS if hasattr(attention, name)), 0)
    dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if dropout > 0:
        return f"has attention dropout {dropout}: build the model with 0"
    width = attrgetter(layout.qkv[-1])(block).out_features // (_heads(attention) * (1 if len(layout.qkv) == 3 else 3))
    if has_own_scale(attention, width):
        return f"scales its attention by something else than 1 / sqrt({width})"
    _LAYOUT_OF[type(block)] = layout
    return None


_DROPOUTS = ("attention_dropout", "dropout_prob", "dropout")


def _is_patched(module: nn.Module) -> bool:
    """Whether a module has hooks or a forward of its own, other than ours and transformers' recorders of outputs."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    forward = vars(module).get("forward")
    return not (forward is None or isinstance(forward, BlockForward)) or any(
        not getattr(hook, "__module__", "").startswith("transformers.utils.") for hook in hooks
    )


@dataclass(frozen=True)
class Host:
    """A class of transformers: a vision encoder, alone or with a head. Its methods are functions of its `Recipe`.

    Attributes:
        encoder: dotted path of the encoder in the host; empty if the host is the encoder.
        blocks: dotted path of the blocks in the encoder.
        norm: name of the encoder's last norm.
        prefix: number of tokens before the patches, without registers.
        reads: which tokens the host's head reads: only those of the `prefix`, also the `mean` of the patches, or `all`.
    """

    encoder: str
    blocks: str
    norm: str
    prefix: int
    reads: str = "all"

    def inside(self, host: nn.Module) -> Any:
        """The encoder."""
        return host.get_submodule(self.encoder)

    def protected(self, host: nn.Module) -> int:
        return self.prefix + int(getattr(self.inside(host).config, "num_register_tokens", 0))

    def class_first(self, host: nn.Module) -> bool:
        return self.prefix > 0

    def prefix_only(self, host: nn.Module) -> bool:
        return self.reads == "prefix"

    def describe(self, host: nn.Module) -> dict[str, Any]:
        """The encoder's architecture, width and input size, which are the same under any head."""
        encoder = self.inside(host)
        config, block = encoder.config, attrgetter(self.blocks)(encoder)[0]
        patch, size = (getattr(config, name, None) for name in ("patch_size", "image_size"))
        return {
            "architecture": f"{config.model_type}_patch{patch}",
            "width": len(attrgetter(_layout(block).norm)(block).weight),
            "input_size": [size, size] if isinstance(size, int) else size and list(size),
        }

    def grad_checkpointing(self, host: nn.Module) -> bool:
        blocks = attrgetter(self.blocks)(self.inside(host))
        return any(getattr(block, "gradient_checkpointing", False) for block in blocks.children())

    def problems(self, host: nn.Module) -> list[str]:
        encoder = self.inside(host)
        problems = []
        for i, block in enumerate(attrgetter(self.blocks)(encoder)):
            problem = _block_problem(block)
            if problem is not None:
                problems.append(f"{self.blocks}.{i} {problem}")
                break
        if getattr(encoder.config, "mask_ratio", 0) and isinstance(encoder, ViTMAEModel):
            problems.append("it hides patches at random: set model.config.mask_ratio = 0")
        if self.reads == "mean" and not getattr(encoder.config, "use_mean_pooling", True):
            problems.append("its head reads the first patch (use_mean_pooling=False), which may have been removed")
        return problems

    def final_norm(self, host: nn.Module) -> nn.Module | None:
        return getattr(self.inside(host), self.norm)

    def hooks(self, body: Body) -> list[RemovableHandle]:
        """Register hooks that pass token sizes to the host's pooling, and refuse what a reduced model cannot record."""
        encoder = self.inside(body.host)
        handles = [encoder.register_forward_pre_hook(partial(refuse_records, body), with_kwargs=True)]
        if isinstance(getattr(encoder, "head", None), nn.Module):
            hook = partial(weigh_by_size, body)
            handles.append(encoder.head.attention.register_forward_pre_hook(hook, with_kwargs=True))
        if self.reads == "mean":
            handles.append(encoder.register_forward_hook(partial(pool_patches, body)))
        if isinstance(encoder, ViTMAEModel):
            handles.append(encoder.embeddings.register_forward_pre_hook(keep_order, with_kwargs=True))
        return handles


def refuse_records(body: Body, encoder: Any, _args: Any, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the encoder: refuse attention masks, and outputs of each block, which would lack tokens."""
    body = running_body(body)
    if not body.reduces():
        return
    mask = kwargs.get("attention_mask")
    if mask is not None and not torch.as_tensor(mask).all():
        raise NotImplementedError(
            "a reduced model does not take an attention_mask: call it inside `with ltmp.dense():`, or call "
            "ltmp.detach(model) for this"
        )
    # transformers records hidden states by hooks on the blocks, which see complete features if they are grids
    names = ("output_attentions",) if body.grid else ("output_hidden_states", "output_attentions")
    requested = [name for name in names if kwargs.get(name, getattr(encoder.config, name, False))]
    if requested:
        raise NotImplementedError(
            f"a reduced model has fewer tokens in each block and does not take {' and '.join(requested)}: call it "
            "inside `with ltmp.dense():`, or call ltmp.detach(model) for this"
        )


def pool_patches(body: Body, _encoder: nn.Module, _args: Any, output: Any) -> None:
    """Forward hook of the encoder, for heads that average the patches in their own code.

    Replaces the patches by a single token, their mean weighted by size, so that the head's average is that mean.
    """
    x, prefix = output.last_hidden_state, body.protected
    size = sizes_of(x, body)
    if size is not None:
        mean = sized_mean(x, without_prefix(size, prefix))
        output.last_hidden_state = torch.cat([x[:, :prefix], mean[:, None]], 1)


def weigh_by_size(body: Body, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of attention pooling, whose keys are the tokens: add log(size) to their scores."""
    size = sizes_of(args[1], body)
    if size is None:
        return None
    return args, {**kwargs, "key_padding_mask": log_size(size).to(args[1].dtype)}


def keep_order(embeddings: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of ViT-MAE's embeddings: keep them from shuffling the patches.

    Merging pairs tokens of even and odd index, which would be other patches in each call.
    """
    if kwargs.get("noise") is None:
        images, (height, width) = args[0], embeddings.patch_embeddings.patch_size
        order = torch.arange(images.shape[-2] // height * (images.shape[-1] // width), device=images.device)
        kwargs = {**kwargs, "noise": order.expand(len(images), -1)}
    return args, kwargs


def rotary_table(_host: nn.Module, embeddings: tuple[Tensor, Tensor], tokens: int) -> Tensor:
    cos, sin = embeddings
    return rotary_rows(sin, cos, tokens)


def rotate_halves(_block: nn.Module, q: Tensor, k: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows[..., None, :]
    return rotated(q, rows, half=True), rotated(k, rows, half=True)


def _path_by_version(model: type[nn.Module], marker: str, with_marker: str, without: str) -> str:
    """Return a path that depends on the version of transformers: on whether the model's file has the class `marker`."""
    return with_marker if hasattr(sys.modules[model.__module__], marker) else without


_VIT = _path_by_version(ViTModel, "ViTEncoder", "encoder.layer", "layers")
_DINOV3 = _path_by_version(DINOv3ViTModel, "DINOv3ViTEncoder", "model.layer", "layer")
_CLIP = _path_by_version(CLIPModel, "CLIPVisionTransformer", "vision_model", "")
_SIGLIP = _path_by_version(SiglipModel, "SiglipVisionTransformer", "vision_model", "")

_TABLE: dict[type[nn.Module], Host] = {
    ViTModel: Host("", _VIT, "layernorm", 1),
    ViTForImageClassification: Host("vit", _VIT, "layernorm", 1, "prefix"),
    ViTMAEModel: Host("", _VIT, "layernorm", 1),
    DeiTModel: Host("", _VIT, "layernorm", 2),
    DeiTForImageClassification: Host("deit", _VIT, "layernorm", 2, "prefix"),
    DeiTForImageClassificationWithTeacher: Host("deit", _VIT, "layernorm", 2, "prefix"),
    Dinov2Model: Host("", "encoder.layer", "layernorm", 1),
    Dinov2ForImageClassification: Host("dinov2", "encoder.layer", "layernorm", 1, "mean"),
    Dinov2WithRegistersModel: Host("", "encoder.layer", "layernorm", 1),
    Dinov2WithRegistersForImageClassification: Host("dinov2_with_registers", "encoder.layer", "layernorm", 1, "mean"),
    DINOv3ViTModel: Host("", _DINOV3, "norm", 1),
    CLIPVisionModel: Host(_CLIP, "encoder.layers", "post_layernorm", 1),
    CLIPVisionModelWithProjection: Host("vision_model", "encoder.layers", "post_layernorm", 1, "prefix"),
    CLIPModel: Host("vision_model", "encoder.layers", "post_layernorm", 1, "prefix"),
    CLIPForImageClassification: Host("vision_model", "encoder.layers", "post_layernorm", 1, "mean"),
    SiglipVisionModel: Host(_SIGLIP, "encoder.layers", "post_layernorm", 0),
    SiglipModel: Host("vision_model", "encoder.layers", "post_layernorm", 0),
    SiglipForImageClassification: Host("vision_model", "encoder.layers", "post_layernorm", 0, "mean"),
    VideoMAEModel: Host("", "encoder.layer", "layernorm", 0),
    VideoMAEForVideoClassification: Host("videomae", "encoder.layer", "layernorm", 0, "mean"),
}


_MLPS = {
    frozenset({"fc1", "activation_fn", "fc2"}): ("mlp.fc1", "mlp.activation_fn", "mlp.fc2"),
    frozenset({"up_proj", "act_fn", "down_proj"}): ("mlp.up_proj", "mlp.act_fn", "mlp.down_proj"),
    frozenset({"dense", "intermediate_act_fn"}): (
        "intermediate.dense", "intermediate.intermediate_act_fn", "output.dense",
    ),
}  # fmt: skip
"""Paths of a plain MLP's two linear layers and activation, by the names of the MLP's children."""

_IDENTITY = nn.Identity()


def _parts(block: nn.Module) -> Parts | None:
    layout = _layout(block)
    norm1, attention, norm2, mlp = attrgetter(layout.norm, layout.attention, *layout.mlp[:2])(block)
    names = _MLPS.get(frozenset(mlp._modules))
    norms = isinstance(norm1, nn.LayerNorm) and isinstance(norm2, nn.LayerNorm)
    if names is None or not norms or layout.qk_norm or getattr(attention, "q_bias", None) is not None:
        return None
    fc1, activation, fc2 = attrgetter(*names)(block)
    act = activation_name(activation)
    if act is None:
        return None
    scale1, scale2 = (
        getattr(getattr(block, f"layer_scale{i}", None), "lambda1", getattr(block, f"lambda_{i}", None)) for i in (1, 2)
    )
    *qkv, proj = attrgetter(*layout.qkv, layout.out[0])(block)
    return Parts(norm1, tuple(qkv), _heads(attention), _IDENTITY, _IDENTITY, proj, scale1, norm2, fc1, act, fc2, scale2)


def _refuses_nothing(_value: Any) -> bool:
    """Accept every argument: `refuse_records` checked the call, and exported hosts may pass masks that hide nothing."""
    return False


def recipe_of(cls: str, host: Host) -> Recipe:
    """Return the recipe of a class of transformers, by its name."""
    rotary = cls == DINOv3ViTModel.__name__
    clip = host.blocks == "encoder.layers"
    name, stack = f"transformers {cls}", f"{host.encoder}.{host.blocks}".lstrip(".")
    return Recipe(
        name, stack, _qkv, _out, _mlp, _attention, _parts, host.problems, _mlp_ratio, host.protected, host.class_first,
        final_norm=host.final_norm,
        prefix_only=host.prefix_only,
        rotary=Rotary(("position_embeddings",), rotary_table, rotate_halves) if rotary else None,
        grad_checkpointing=host.grad_checkpointing,
        hooks=host.hooks,
        describe=host.describe,
        refuses=_refuses_nothing,
        arguments={"attention_mask": None} if clip else {},
    )  # fmt: skip


# before transformers 5.10, these two held an encoder of another class
for _model, _name, _prefix in ((CLIPModel, "CLIPVisionTransformer", 1), (SiglipModel, "SiglipVisionTransformer", 0)):
    _encoder = getattr(sys.modules[_model.__module__], _name, None)
    if _encoder is not None:
        _TABLE[_encoder] = Host("", "encoder.layers", "post_layernorm", _prefix)

HOSTS: dict[type[nn.Module], Recipe | str] = {cls: recipe_of(cls.__name__, host) for cls, host in _TABLE.items()}
# any other model of transformers may read the tokens of an encoder inside it
HOSTS[PreTrainedModel] = READS_TOKENS
