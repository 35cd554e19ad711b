"""What a model's cache will hold, said before anything is loaded; knows nothing of vLLM's code, only its arithmetic."""
