"""Recipe of a host model: where its blocks are, what the halves of a block compute, and how to attach to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Parts:
    """The weights of a standard block, for engines that fuse across its modules.

    Attributes:
        norm1, norm2: layer norms over C.
        qkv: one linear layer to [q, k, v], or three.
        q_norm, k_norm: norms over D of [..., D]; Identity if the block has none.
        scale1, scale2: layer-scale vectors [C], or None.
        act: "gelu", "gelu_tanh" or "quick_gelu".
    """

    norm1: nn.LayerNorm
    qkv: tuple[nn.Linear, ...]
    heads: int
    q_norm: nn.Module
    k_norm: nn.Module
    proj: nn.Linear
    scale1: Tensor | None
    norm2: nn.LayerNorm
    fc1: nn.Linear
    act: str
    fc2: nn.Linear
    scale2: Tensor | None

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        """All linear layers."""
        return (*self.qkv, self.proj, self.fc1, self.fc2)

    def project(self, x: Tensor, linear: Callable[[nn.Linear, Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Compute q, k, v [T, H, D] from normed x [T, C]; `linear` applies a layer."""
        if len(self.qkv) == 1:
            y = linear(self.qkv[0], x)
            q, k, v = y.view(*y.shape[:-1], 3, self.heads, y.shape[-1] // (3 * self.heads)).unbind(-3)
        else:
            q, k, v = (linear(layer, x).unflatten(-1, (self.heads, -1)) for layer in self.qkv)
        return self.q_norm(q), self.k_norm(k), v


def the_same(value: Any, _block: int) -> Any:
    """All blocks are called with the same value."""
    return value


@dataclass(frozen=True)
class Rotary:
    """Rotary position embeddings of a host.

    Attributes:
        names: keyword arguments of the blocks that carry the embeddings; empty if blocks compute them themselves.
        table: (host, value of that argument or a tuple of several values, N tokens) -> [N, E], or [L, N, E] if each
            block has its own; rows of prefix tokens do not rotate.
        rotate: (block, q [..., H, D], k [..., H, D], rows [..., E]) -> q, k as the softmax needs them.
        own: (value of an argument, number of a block) -> the value to call that block with.
    """

    names: tuple[str, ...]
    table: Callable[[nn.Module, Any, int], Tensor]
    rotate: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    own: Callable[[Any, int], Any] = the_same


READS_TOKENS = "reads tokens"
"""In place of a recipe: the model reads all tokens of an encoder inside it, by position."""
READS_LOGITS = "reads logits"
"""In place of a recipe: the model reads the outputs of an encoder inside it, but no tokens."""

Bias = Callable[[Tensor], Tensor]
"""Original positions of tokens, int [B, N] (`Tokens.origin`) -> attention bias, [B, H or 1, N, N]."""


# -- defaults of a recipe


def no_bias(_host: nn.Module, _block: int, _named: Mapping[str, Any]) -> Bias | None:
    """Attention has no bias."""
    return None


def one_sequence(_host: nn.Module, _x: Tensor, _named: Mapping[str, Any]) -> None:
    """Features are [B, N, C], prefix tokens first."""


def every_block(_host: nn.Module) -> None:
    """All blocks may remove tokens, or all are run."""


def one_class_token(host: nn.Module) -> int:
    """The class token is the only prefix token."""
    return 1


def class_comes_first(host: nn.Module) -> bool:
    """The first token is a class token."""
    return True


def set_nothing(_body: Any) -> dict[str, Any]:
    """No attribute of the host is overridden."""
    return {}


def no_pooling(host: nn.Module) -> None:
    """No tokens are pooled, so no token sizes have to pass a norm."""


def reads_prefix_only(host: nn.Module) -> bool:
    """The head reads prefix tokens only."""
    return True


def has_grad_checkpointing(host: nn.Module) -> bool:
    """Whether gradient checkpointing is on, by the attribute that timm's models have."""
    return bool(getattr(host, "grad_checkpointing", False))


def describe_timm(host: Any) -> dict[str, Any]:
    """Architecture, width and input size of one of timm's models."""
    size = getattr(getattr(host, "patch_embed", None), "img_size", None)
    return {
        "architecture": (getattr(host, "pretrained_cfg", None) or {}).get("architecture"),
        "width": getattr(host, "embed_dim", None),
        "input_size": list(size) if size is not None else None,
    }


def is_set(value: Any) -> bool:
    """Whether an argument of the blocks is set, so that it could change what they compute."""
    return value is not None and value is not False


def no_hooks(_body: Any) -> list[RemovableHandle]:
    """No hooks are registered: overriding attributes is enough."""
    return []


@dataclass(frozen=True)
class Recipe:
    """A pre-norm transformer as a few module-level functions (lambdas cannot be pickled with the model).

    The block functions are row-wise: they take any leading shape, padded [B, N, C] or packed [T, C]. The defaults are
    for a host with one class token, the only token that its head reads.

    Attributes:
        name: name of the host in messages.
        stack: dotted path of the container of blocks.
        qkv: (block, x [..., C]) -> q, k, v, each [..., H, D]; includes norm, projection and head norms, and scales q
            if the host's scale is not 1 / sqrt(D).
        out: (block, y [..., H * D]) -> first residual branch [..., C].
        mlp: (block, x [..., C]) -> second residual branch [..., C].
        attention: block -> its modules whose parts are run without calling the modules themselves.
        parts: block -> its weights for fused engines, or None if it is not a standard block.
        problems: host -> reasons why it cannot be attached, one phrase each; empty if it can.
        mlp_ratio: block -> hidden width over C of a two-layer MLP of the same cost.
        protected: host -> number of prefix tokens.
        class_first: host -> whether its first token is a class token rather than a register or a patch.
        loop: name of the method that runs all blocks, of the module that holds their container.
        overrides: body -> attributes to set while attached (pooling weighted by size), by dotted path from the host.
        final_norm: host -> the module between the blocks and the pooling; None if nothing is pooled.
        prefix_only: host -> whether its head reads the prefix tokens only.
        rotary: rotary position embeddings of its attention; None if positions are added before the first block.
        grad_checkpointing: host -> whether blocks are to be recomputed in backward.
        hooks: body -> handles of the hooks that it registered; they are removed with the attachment.
        refuses: value of a keyword argument of the blocks that carries no positions -> whether to refuse the call.
        arguments: keyword arguments that the host's own blocks must be called with.
        forms: what the host can receive after its last block (`config.FORMS`), its default first.
        bias: (host, number of a block, keyword arguments of that block) -> bias of its attention, or None.
        images: (host, features, keyword arguments of the blocks) -> `engines.segments.Segments`; None if features are
            [B, N, C] with the prefix tokens first.
        reduces: host -> for each block whether it may remove tokens, or None for all.
        wraps: whether blocks return a pair, its second element None unless attention maps are requested.
        depth: host -> number of its blocks that are run, or None for all; later ones are left to the host.
        describe: host -> what identifies it in thresholds files, as JSON types: `architecture`, `width` and
            `input_size`, each None if unknown.
    """

    name: str
    stack: str
    qkv: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor, Tensor]]
    out: Callable[[nn.Module, Tensor], Tensor]
    mlp: Callable[[nn.Module, Tensor], Tensor]
    attention: Callable[[nn.Module], Sequence[nn.Module]]
    parts: Callable[[nn.Module], Parts | None]
    problems: Callable[[nn.Module], list[str]]
    mlp_ratio: Callable[[nn.Module], float]
    protected: Callable[[nn.Module], int] = one_class_token
    class_first: Callable[[nn.Module], bool] = class_comes_first
    loop: str = "forward"
    overrides: Callable[[Any], dict[str, Any]] = set_nothing
    final_norm: Callable[[nn.Module], nn.Module | None] = no_pooling
    prefix_only: Callable[[nn.Module], bool] = reads_prefix_only
    rotary: Rotary | None = None
    grad_checkpointing: Callable[[nn.Module], bool] = has_grad_checkpointing
    hooks: Callable[[Any], list[RemovableHandle]] = no_hooks
    refuses: Callable[[Any], bool] = is_set
    arguments: Mapping[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ("reduced", "grid")
    bias: Callable[[nn.Module, int, Mapping[str, Any]], Bias | None] = no_bias
    images: Callable[[nn.Module, Tensor, Mapping[str, Any]], Any] = one_sequence
    reduces: Callable[[nn.Module], Sequence[bool] | None] = every_block
    wraps: bool = False
    depth: Callable[[nn.Module], int | None] = every_block
    describe: Callable[[nn.Module], dict[str, Any]] = describe_timm


# -- helpers of recipes


def is_plain(parts: Parts) -> bool:
    """Whether engines can use a block's weights directly, without calling its modules.

    Linear layers must be exactly that, with no adapter around them, and all weights plain tensors: quantised, sharded
    and offloaded ones are tensor subclasses, which support torch's operators only.
    """
    for layer in parts.linears:
        weights = layer._parameters
        weight = weights.get("weight")
        if type(layer) not in _LINEAR or type(weight) is not nn.Parameter:
            return False
        if "bias" not in weights or type(weights["bias"]) not in _PLAIN:
            return False
    norms = (parts.norm1._parameters, parts.norm2._parameters)
    others = (parts.scale1, parts.scale2, *norms[0].values(), *norms[1].values())
    return all(type(other) in _PLAIN for other in others)


_PLAIN = (nn.Parameter, Tensor, type(None))
# the second is the output projection of torch.nn.MultiheadAttention
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Make a linear layer of weights that a host keeps in another form; shares them, without gradients."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer._parameters.update(
        weight=nn.Parameter(weight, False), bias=None if bias is None else nn.Parameter(bias, False)
    )
    return layer


def linear_ratio(mlp: nn.Module, width: int) -> float:
    """Hidden width over C of a two-layer MLP that costs as much as the linear layers of `mlp`."""
    # from the declared sizes: the weights of quantised layers are packed
    return sum(layer.in_features * layer.out_features for layer in _linears(mlp)) / (2 * width * width)


def _linears(module: nn.Module) -> Iterator[Any]:
    """The linear layers inside: torch's own, and those of other classes that do not wrap one."""
    for layer in module.modules():
        has_sizes = all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))
        if isinstance(layer, nn.Linear) or (has_sizes and not any(isinstance(m, nn.Linear) for m in layer.modules())):
            yield layer


def has_own_scale(attention: nn.Module, width: int) -> bool:
    """Whether an attention scales its scores by something other than 1 / sqrt(D).

    Args:
        width: width of a head, D.
    """
    scale = next((vars(attention)[name] for name in ("scale", "scaling") if name in vars(attention)), None)
    return isinstance(scale, float) and not math.isclose(scale, width**-0.5, rel_tol=1e-6)


_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def scales_of(layers: Sequence[Any], layer_scale: type[Any]) -> list[Tensor | None] | None:
    """The vectors [C] of layers of class `layer_scale`, None for each Identity; None if any layer is something else."""
    if not all(isinstance(layer, layer_scale | nn.Identity) for layer in layers):
        return None
    return [layer.gamma if isinstance(layer, layer_scale) else None for layer in layers]


def activation_name(act: nn.Module) -> str | None:
    """The name of an activation in `Parts.act`, or None."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    # classes of timm and transformers, by name because they move between versions
    return _ACTIVATIONS.get(type(act).__name__.removesuffix("Activation").removeprefix("Pytorch"))
