"""The command line. Imports no vLLM: it needs torch, safetensors and, to calibrate and to evaluate, transformers."""
