"""Device functions that several kernels call, and what they are handed."""
