"""Norms of keys: what a module computes, whether it does so before or behind RoPE, and what takes its place."""
