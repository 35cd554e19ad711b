"""What a quantized cache costs in quality, measured. Runs on the transformers model; imports no vLLM."""
