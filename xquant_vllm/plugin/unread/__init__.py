"""What names this package in a configuration or in the environment, and has no effect: it is said, not passed over."""
