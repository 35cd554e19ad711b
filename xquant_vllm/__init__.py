"""KV cache rematerialization (XQuant, arXiv 2508.10395) as a vLLM attention backend.

The rooms and the order in which they may import each other are listed in ``pyproject.toml`` (``tool.importlinter``).
Importing this package imports neither torch nor vLLM.
"""

__version__ = "0.1.0"
