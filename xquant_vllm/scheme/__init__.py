"""From settings and a checkpoint to what every layer of the cache is made of; knows nothing of vLLM."""
