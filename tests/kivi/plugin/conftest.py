"""Fixtures of tests of what vLLM calls."""

from tests.models_in_process import models_are_looked_at_here

__all__ = ["models_are_looked_at_here"]
