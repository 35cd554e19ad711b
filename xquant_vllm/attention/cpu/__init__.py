"""The C++ kernels of csrc/cpu, and what hands layers and batches to them."""
