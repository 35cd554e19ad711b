"""Parts of the CPU benchmarks."""
