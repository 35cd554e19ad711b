"""What is asked of a cache, and how answers are scored."""
