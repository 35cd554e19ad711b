"""KIVI (Liu et al., arXiv 2402.02750): a cache of per-channel quantized keys and per-token quantized values."""
