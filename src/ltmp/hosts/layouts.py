"""Where the layers of transformers keep their parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where a block keeps what: dotted names of its modules, in the order in which they are applied.

    Attributes:
        norm: before attention.
        qkv: its three projections, or one that makes q, k and v in this order.
        out: what the result passes; a parameter is multiplied by.
        mlp: norm, MLP, and what its result passes.
        qk_norm: norms of q and k before they are split into heads.
    """

    norm: str
    qkv: tuple[str, ...]
    out: tuple[str, ...]
    mlp: tuple[str, ...]
    qk_norm: tuple[str, ...] = ()

    @property
    def attention(self) -> str:
        """Name of the module that holds the projections and knows the number of heads."""
        return self.qkv[0].rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all modules that run."""
        return (self.norm, *self.qkv, *self.qk_norm, *self.out, *self.mlp)

    @property
    def holders(self) -> set[str]:
        """Names of the containers of these modules, from the block down, which do not run themselves."""
        return {".".join(name.split(".")[:depth]) for name in self.names for depth in range(name.count(".") + 1)}

    def fits(self, block: nn.Module) -> bool:
        """Whether the block has exactly these parts."""
        names, holders = self.names, self.holders
        have = {name for name, _ in block.named_modules()} | {
            name for name, parameter in block.named_parameters() if not name.endswith(("weight", "bias"))
        }
        aside = (*(f"{self.attention}.{bias}" for bias in ("q_bias", "v_bias")), *BIASES)
        known = {*names, *holders, *aside, f"{self.attention}.dropout"}
        found = (
            f"{holder}.{part}".lstrip(".")
            for holder in holders & have
            for parts in (block.get_submodule(holder)._modules, block.get_submodule(holder)._parameters)
            for part in parts
        )
        return have.issuperset(names) and known.issuperset(found)


BIASES = ("relative_position_bias", "attention.attention.relative_position_bias")
"""Modules that make a number for each pair of places."""


_PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_NESTED = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
LAYOUTS = (
    # ViT, DeiT and ViT-MAE
    Layout("layernorm_before", _PROJECTIONS, ("attention.o_proj", "dropout"), ("layernorm_after", "mlp", "dropout")),
    # VideoMAE, and the three above before 5.10
    Layout(
        "layernorm_before", _NESTED, ("attention.output.dense", "attention.output.dropout"),
        ("layernorm_after", "intermediate", "output.dense", "output.dropout"),
    ),
    # DINOv3, DINOv2 with and without registers
    Layout(
        "norm1", _PROJECTIONS, ("attention.o_proj", "layer_scale1", "drop_path"),
        ("norm2", "mlp", "layer_scale2", "drop_path"),
    ),
    # DINOv2 before 5.20
    Layout(
        "norm1", _NESTED, ("attention.output.dense", "attention.output.dropout", "layer_scale1", "drop_path"),
        ("norm2", "mlp", "layer_scale2", "drop_path"),
    ),
    # CLIP and SigLIP
    Layout(
        "layer_norm1", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",),
        ("layer_norm2", "mlp"),
    ),
    # Idefics, SmolVLM, Kosmos-2 and others have CLIP's parts; BLIP and InstructBLIP one projection
    Layout("layer_norm1", ("self_attn.qkv",), ("self_attn.projection",), ("layer_norm2", "mlp")),
    # Qwen-VL and GLM-V
    Layout("norm1", ("attn.qkv",), ("attn.proj",), ("norm2", "mlp")),
    # AIMv2 and Ovis 2
    Layout("rms_norm1", _PROJECTIONS, ("attention.out_proj",), ("rms_norm2", "ffn")),
    # Pixtral
    Layout("attention_norm", _PROJECTIONS, ("attention.o_proj",), ("ffn_norm", "feed_forward")),
    # InternVL
    Layout(
        "layernorm_before", _PROJECTIONS, ("attention.projection_layer", "attention.projection_dropout", "lambda_1"),
        ("layernorm_after", "mlp", "dropout", "lambda_2"), ("attention.q_norm", "attention.k_norm"),
    ),
    # EoMT
    Layout(
        "norm1", _PROJECTIONS, ("attention.out_proj", "layer_scale1", "drop_path"),
        ("norm2", "mlp", "layer_scale2", "drop_path"),
    ),
    # V-JEPA 2
    Layout(
        "norm1", ("attention.query", "attention.key", "attention.value"), ("attention.proj", "drop_path"),
        ("norm2", "mlp", "drop_path"),
    ),
    # BEiT
    Layout(
        "layernorm_before", _PROJECTIONS, ("attention.o_proj", "dropout", "lambda_1", "drop_path"),
        ("layernorm_after", "mlp", "dropout", "lambda_2", "drop_path"),
    ),
    # Data2Vec
    Layout(
        "layernorm_before", _NESTED, ("attention.output.dense", "attention.output.dropout", "lambda_1", "drop_path"),
        ("layernorm_after", "intermediate", "output.dense", "output.dropout", "lambda_2", "drop_path"),
    ),
    # ViTPose
    Layout(
        "layernorm_before", _NESTED, ("attention.output.dense", "attention.output.dropout"), ("layernorm_after", "mlp")
    ),
)  # fmt: skip
