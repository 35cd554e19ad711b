"""From what new tokens bring to bytes in their slots."""
