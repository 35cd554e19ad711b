"""Triton kernels: paged store and paged attention on GPUs."""
