"""The caches that are compared."""
