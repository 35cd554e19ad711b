"""Parts of bench_offline.py."""
