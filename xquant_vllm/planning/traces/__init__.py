"""What requests gain from a larger cache: traces of requests, and a cache that keeps blocks as vLLM's does."""
