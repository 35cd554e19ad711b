"""Parts of bench_serving.py."""
