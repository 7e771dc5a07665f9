"""Where the layers of transformers keep their parts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Layout:
    """Where a block keeps what: dotted names of its modules, in the order in which they are applied."""

    norm: str
    qkv: tuple[str, str, str]
    out: tuple[str, ...]
    mlp: tuple[str, ...]

    @property
    def attention(self) -> str:
        """Name of the module that holds the projections and knows the number of heads."""
        return self.qkv[0].rpartition(".")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all modules that run."""
        return (self.norm, *self.qkv, *self.out, *self.mlp)

    @property
    def holders(self) -> set[str]:
        """Names of the containers of these modules, from the block down, which do not run themselves."""
        return {".".join(name.split(".")[:depth]) for name in self.names for depth in range(name.count(".") + 1)}

    def fits(self, block: nn.Module) -> bool:
        """Whether the block has exactly these parts."""
        names, holders = self.names, self.holders
        have = {name for name, _ in block.named_modules()}
        known = {*names, *holders, *(f"{self.attention}.{bias}" for bias in ("q_bias", "v_bias"))}
        found = (
            f"{holder}.{part}".lstrip(".")
            for holder in holders & have
            for parts in (block.get_submodule(holder)._modules, block.get_submodule(holder)._parameters)
            for part in parts
        )
        return have.issuperset(names) and known.issuperset(found)


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
)  # fmt: skip
