"""What a kernel can speed up: plain tensors in, plain tensors out. Each op's `reference` defines its result."""
