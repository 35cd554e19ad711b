"""Hot blocks: which rows are attended from the pool, and what a step writes to it."""
