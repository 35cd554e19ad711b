"""KV cache rematerialization (XQuant, arXiv 2508.10395) as a vLLM attention backend.

Rooms, in the only direction they may import each other: ``codec <- projection <- attention <- integration <- offline <-
evaluation <- cli``.
Importing this package imports neither torch nor vLLM.
"""

__version__ = "0.1.0"
