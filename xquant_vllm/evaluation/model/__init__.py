"""A transformers model whose keys and values pass through a cache."""
