"""Models that run through vLLM's Transformers backend: their attention modules are those of Hugging Face's library."""
