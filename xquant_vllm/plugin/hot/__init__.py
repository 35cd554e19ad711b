"""Hot blocks in vLLM: their memory, and what a layer, a batch and a worker do with them."""
