"""Triton reads TRITON_INTERPRET when it is imported, so these tests run in a process of their own (make test-gpu)."""

import os

import torch

collect_ignore_glob: list[str] = []
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["*test_*.py"]  # of the folders below, too
