"""A vLLM engine for `xquant eval --through vllm`."""
