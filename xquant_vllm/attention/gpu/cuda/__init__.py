"""The CUDA C++ kernels of csrc/cuda, and what hands layers and batches to them."""
