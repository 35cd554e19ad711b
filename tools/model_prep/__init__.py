"""The parts of tools/prepare_model.py.

Only checkpoint and gguf_convert import torch, so that a finished folder is checked fast.
"""
