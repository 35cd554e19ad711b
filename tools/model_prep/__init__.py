"""The parts of tools/prepare_model.py. Only gguf_convert imports torch, so that a finished folder is checked fast."""
