"""Where the blocks of transformers' models keep their parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Dotted names of a block's modules and parameters, in the order in which they are applied.

    Attributes:
        norm: norm before attention.
        qkv: the three projections to q, k and v, or one to all of them in this order.
        out: modules applied to the result of attention; a parameter in their place is multiplied (layer scale).
        mlp: norm, MLP, and modules or parameters applied to the MLP's result.
        qk_norm: norms of q and k before they are split into heads.
    """

    norm: str
    qkv: tuple[str, ...]
    out: tuple[str, ...]
    mlp: tuple[str, ...]
    qk_norm: tuple[str, ...] = ()

    @property
    def attention(self) -> str:
        """Name of the attention module, which holds the projections and the number of heads."""
        return self.qkv[0].rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything that is applied."""
        return (self.norm, *self.qkv, *self.qk_norm, *self.out, *self.mlp)

    @property
    def holders(self) -> set[str]:
        """Names of the modules around those in `names`, from the block ("") down, which are not called themselves."""
        return {".".join(name.split(".")[:depth]) for name in self.names for depth in range(name.count(".") + 1)}

    def fits(self, block: nn.Module) -> bool:
        """Whether the block has all of these parts and no others, apart from biases and attention dropout."""
        modules = {name for name, _ in block.named_modules()}
        parameters = {name for name, _ in block.named_parameters() if not name.endswith(("weight", "bias"))}
        if not (modules | parameters).issuperset(self.names):
            return False
        optional = (f"{self.attention}.{name}" for name in ("q_bias", "v_bias", "dropout"))
        known = {*self.names, *self.holders, *optional, *_RELATIVE_POSITION_BIASES}
        for holder in self.holders:
            module = block.get_submodule(holder)
            for part in (*module._modules, *module._parameters):
                if f"{holder}.{part}".lstrip(".") not in known:
                    return False
        return True


_RELATIVE_POSITION_BIASES = ("relative_position_bias", "attention.attention.relative_position_bias")

_PROJECTIONS = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_NESTED = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
# the first layout that fits is used
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
    # BLIP and InstructBLIP; Idefics, SmolVLM, Kosmos-2 and more have CLIP's layout
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
