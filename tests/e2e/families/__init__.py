"""Families that need more than a configuration of their text model: images, and states beside attention."""
