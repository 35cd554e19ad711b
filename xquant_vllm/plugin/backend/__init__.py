"""The attention backend: what runs in every step."""
