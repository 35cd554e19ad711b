"""What yields logits: transformers with a simulated cache, or vLLM with the real one."""
