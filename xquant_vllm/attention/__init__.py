"""Paged store and paged attention over quantized latents: a PyTorch reference and kernels held against it."""
