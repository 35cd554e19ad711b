"""The C++ kernels of csrc/cpu/kivi, and what hands layers and batches to them."""
