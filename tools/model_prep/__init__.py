"""The parts of tools/prepare_model.py and tools/repeat_kv_heads.py.

Only checkpoint, gguf_convert and repeat_heads import torch, so that a finished folder is checked fast.
"""
