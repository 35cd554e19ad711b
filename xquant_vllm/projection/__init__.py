"""Bases of the latents, fused up-projections and the rematerialization of keys and values. Imports torch and codec."""
