"""Operations with kernels: plain tensors in and out. The `reference` of each defines its result."""
