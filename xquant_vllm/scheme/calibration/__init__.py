"""What a server's first start calibrates: whether, on which text, and where the result is kept."""
