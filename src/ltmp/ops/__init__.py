"""Operations with kernels: plain tensors in and out. The module `reference` of an operation defines its result."""

KERNEL_SIMILARITIES = frozenset({"mean", "heads", "probe"})
KERNEL_IMPORTANCES = frozenset({"received", "probe", "class", "random"})
"""Kinds of scores that kernels compute, see `config.Scores`; models with any other kind run in plain torch."""
