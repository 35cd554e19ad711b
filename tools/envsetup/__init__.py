"""The parts of tools/setup_env.py. Standard library only: they run before anything is installed."""
