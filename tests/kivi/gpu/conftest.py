"""Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own (make test-gpu)."""

from tests.attention.gpu.conftest import collect_ignore_glob

__all__ = ["collect_ignore_glob"]
