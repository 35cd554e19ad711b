"""What a quantized cache costs in quality, measured on the transformers model or through vLLM. Imports no vLLM."""
