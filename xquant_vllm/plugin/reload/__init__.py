"""New weights for a running model: surgery is taken back, vLLM loads them, and the model is operated on anew."""
