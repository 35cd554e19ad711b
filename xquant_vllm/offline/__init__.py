"""A checkpoint outside of vLLM: its weights, texts, and what the transformers model computes on them."""
