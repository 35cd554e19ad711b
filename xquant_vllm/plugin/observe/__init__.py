"""What operators see of the cache: the summary at start-up, metrics, and the quality probe."""
