"""The command line. Imports no vLLM: factorizing needs torch, safetensors and, to calibrate or evaluate, transformers."""
