"""Fitting bases to a text: its tokens, what the model does to them, and the bits of every channel."""
