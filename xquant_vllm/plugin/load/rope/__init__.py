"""What turns a model's keys: rotary tables as kernels take them, read from vLLM's modules."""
