"""Where the factor cache is, and what its files are called. Imports no torch: it must say so where that is broken."""

import os
from pathlib import Path

SUFFIX, PART_SUFFIX = ".safetensors", ".tmp"
# In the metadata of an entry: what it is of, as JSON.
ABOUT = "about"


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/xquant_vllm``, or ``~/.cache/xquant_vllm``; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "xquant_vllm"
    except RuntimeError:  # no HOME, and no entry in the list of users
        return None
