"""Operations with kernels: plain tensors in and out. The module `reference` of an operation defines its result."""
