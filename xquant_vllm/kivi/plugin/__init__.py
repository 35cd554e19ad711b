"""Everything about KIVI that knows vLLM."""
