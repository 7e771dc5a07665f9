"""Description of a host model: where its blocks are and what the two halves of a block do."""

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

    `norm1`/`norm2` are LayerNorms over C; `qkv` one Linear to [q, k, v], or three; `q_norm`/`k_norm` act on [..., D]
    (Identity when absent); `scale1`/`scale2` are layer-scale vectors [C] or None; `act` is "gelu", "gelu_tanh" or
    "quick_gelu".
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
        """q, k, v [T, H, D] of normed x [T, C], with `linear` to apply a layer."""
        if len(self.qkv) == 1:
            y = linear(self.qkv[0], x)
            q, k, v = y.view(*y.shape[:-1], 3, self.heads, y.shape[-1] // (3 * self.heads)).unbind(-3)
        else:
            q, k, v = (linear(layer, x).unflatten(-1, (self.heads, -1)) for layer in self.qkv)
        return self.q_norm(q), self.k_norm(k), v


def the_same(value: Any, _block: int) -> Any:
    """All blocks are told the same."""
    return value


def is_plain(parts: Parts) -> bool:
    """Whether weights can be taken from a block and multiplied by ourselves.

    Linear layers must be just that, with no adapter around them, and all weights plain tensors: quantised, sharded or
    offloaded ones are tensors of their own kinds, which know operators of torch alone.
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
# the second is what torch.nn.MultiheadAttention ends with
_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)


@dataclass(frozen=True)
class Rotary:
    """How a host tells its attention where tokens are.

    Attributes:
        names: keywords of the blocks that carry the positions; none where blocks find them by themselves.
        table: (host, what came under that name or a tuple of several, N tokens) -> [N, E], or [L, N, E] where the host
            gave each block its own; rows of prefix tokens say "not rotated".
        rotate: (block, q [..., H, D], k [..., H, D], rows [..., E]) -> q, k as the softmax sees them.
        own: (what came under a name, number of a block) -> what that block is to be called with.
    """

    names: tuple[str, ...]
    table: Callable[[nn.Module, Any, int], Tensor]
    rotate: Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    own: Callable[[Any, int], Any] = the_same


READS_TOKENS = "reads tokens"
"""Stands in for a recipe where a model reads the tokens of an encoder inside it, each in its place."""
READS_LOGITS = "reads logits"
"""The same where it reads no tokens."""

Bias = Callable[[Tensor], Tensor]
"""Places of tokens, int [B, N], as `Tokens.origin` has them -> what to add to their attention, [B, H or 1, N, N]."""


def no_bias(_host: nn.Module, _block: int, _named: Mapping[str, Any]) -> Bias | None:
    """Attention adds nothing to its scores."""
    return None


def one_sequence(_host: nn.Module, _x: Tensor, _named: Mapping[str, Any]) -> None:
    """Features are [B, N, C], prefix tokens first."""


def every_block(_host: nn.Module) -> None:
    """All blocks may remove tokens."""


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of weights that a host keeps otherwise; nothing is copied, and no gradient reaches them."""
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer._parameters.update(
        weight=nn.Parameter(weight, False), bias=None if bias is None else nn.Parameter(bias, False)
    )
    return layer


def linear_ratio(mlp: nn.Module, width: int) -> float:
    """Hidden width over C of a two-layer MLP that costs what the linear layers of `mlp` do."""
    # from the shapes: the weights of quantised layers are packed
    return sum(layer.in_features * layer.out_features for layer in _linears(mlp)) / (2 * width * width)


def _linears(module: nn.Module) -> Iterator[Any]:
    """The linear layers inside: torch's own, and those of other classes that are not wrapped around one."""
    for layer in module.modules():
        says = all(isinstance(getattr(layer, name, None), int) for name in ("in_features", "out_features"))
        if isinstance(layer, nn.Linear) or (says and not any(isinstance(m, nn.Linear) for m in layer.modules())):
            yield layer


def has_own_scale(attention: nn.Module, width: int) -> bool:
    """Whether an attention multiplies the scores of heads [..., D] by something else than 1 / sqrt(D).

    Args:
        width: D.
    """
    scale = next((vars(attention)[name] for name in ("scale", "scaling") if name in vars(attention)), None)
    return isinstance(scale, float) and not math.isclose(scale, width**-0.5, rel_tol=1e-6)


_ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}


def scales_of(layers: Sequence[Any], layer_scale: type[Any]) -> list[Tensor | None] | None:
    """The vectors [C] of layers of the class `layer_scale`, None for an Identity; None where one is something else."""
    if not all(isinstance(layer, layer_scale | nn.Identity) for layer in layers):
        return None
    return [layer.gamma if isinstance(layer, layer_scale) else None for layer in layers]


def activation_name(act: nn.Module) -> str | None:
    """The name that `Parts` has for an activation, or None."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    # libraries' own classes, by name because they move between versions
    return _ACTIVATIONS.get(type(act).__name__.removesuffix("Activation").removeprefix("Pytorch"))


def one_class_token(host: nn.Module) -> int:
    """Of most hosts."""
    return 1


def class_comes_first(host: nn.Module) -> bool:
    """So it does in most hosts."""
    return True


def set_nothing(_body: Any) -> dict[str, Any]:
    """Nothing of the host stands in the way."""
    return {}


def no_pooling(host: nn.Module) -> None:
    """No rows are pooled, so that no sizes need to pass a norm."""


def reads_prefix_only(host: nn.Module) -> bool:
    """The head reads the class token."""
    return True


def has_grad_checkpointing(host: nn.Module) -> bool:
    """timm's way to ask for it."""
    return bool(getattr(host, "grad_checkpointing", False))


def describe_timm(host: Any) -> dict[str, Any]:
    """Architecture, width and input size as timm's models know them."""
    size = getattr(getattr(host, "patch_embed", None), "img_size", None)
    return {
        "architecture": (getattr(host, "pretrained_cfg", None) or {}).get("architecture"),
        "width": getattr(host, "embed_dim", None),
        "input_size": list(size) if size is not None else None,
    }


def asks_something(value: Any) -> bool:
    """Whether an argument that a host gives its blocks could change what they compute."""
    return value is not None and value is not False


def no_hooks(_body: Any) -> list[RemovableHandle]:
    """For hosts whose attributes are enough to override."""
    return []


@dataclass(frozen=True)
class Recipe:
    """A pre-norm transformer as a few module-level functions (lambdas cannot be pickled with the model).

    The block functions are row-wise: any leading shape, padded [B, N, C] or packed [T, C]. Defaults are those of a host
    with one class token that alone its head reads.

    Attributes:
        name: what to call the host in messages.
        stack: dotted path of the container of blocks.
        loop: name of the method that runs all blocks, of the module that holds their container.
        qkv: (block, x [..., C]) -> q, k, v, each [..., H, D]; norm, projection and head norms included, and a scale
            of q where the host's is not 1 / sqrt(D).
        out: (block, y [..., H * D]) -> first residual branch [..., C].
        mlp: (block, x [..., C]) -> second residual branch [..., C].
        attention: block -> those of its modules that hold what is run and are not called themselves.
        parts: block -> its weights for fused engines, or None where it is not a standard one.
        problems: host -> what stands in the way, one phrase each; empty when it can be attached.
        mlp_ratio: block -> hidden width over C of a two-layer MLP of the same cost.
        protected: host -> number of prefix tokens.
        class_first: host -> whether its first token is a class token, and not a register or a patch.
        overrides: body -> attributes to set while attached (pooling that knows sizes), by dotted path from the host.
        final_norm: host -> the module between the blocks and the pooling; None where nothing pools rows.
        prefix_only: host -> whether its head reads nothing but the prefix tokens.
        rotary: how its attention learns where tokens are; None where they were told before the first block.
        grad_checkpointing: host -> whether blocks are to be recomputed in backward.
        hooks: body -> handles of the hooks it registered, which are removed with the attachment.
        refuses: argument of the blocks that is no position -> whether to refuse the call.
        arguments: what the host's own blocks cannot be called without.
        forms: what the host can get behind its blocks (`config.FORMS`), its default first.
        bias: (host, number of a block, what the host gives that block by name) -> what its attention adds, or None.
        images: (host, features, what it gives its blocks by name) -> `engines.segments.Segments`; None where features
            are [B, N, C] with the prefix tokens first.
        reduces: host -> for each block whether it may remove tokens, or None for all.
        wraps: whether blocks return a pair, the second of them None unless attention maps are asked for.
        depth: host -> number of its blocks that are run, or None for all; later ones are the host's own.
        describe: host -> what thresholds are bound to, and what is good to know of it, JSON types by the names
            `architecture`, `width` and `input_size`; None where it is not known.
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
    refuses: Callable[[Any], bool] = asks_something
    arguments: Mapping[str, Any] = field(default_factory=dict)
    forms: tuple[str, ...] = ("reduced", "grid")
    bias: Callable[[nn.Module, int, Mapping[str, Any]], Bias | None] = no_bias
    images: Callable[[nn.Module, Tensor, Mapping[str, Any]], Any] = one_sequence
    reduces: Callable[[nn.Module], Sequence[bool] | None] = every_block
    wraps: bool = False
    depth: Callable[[nn.Module], int | None] = every_block
    describe: Callable[[nn.Module], dict[str, Any]] = describe_timm
