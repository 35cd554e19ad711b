"""Rewrites a grouped-query checkpoint as a multi-head one that computes the same, by repeating its KV heads.

SOURCE is a folder with a Hugging Face checkpoint in safetensors, with separate k_proj and v_proj (Llama, Mistral, Qwen,
Gemma). Progress goes to stderr; the last line on stdout is TARGET.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_prep.recipe import PrepareError


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of the grouped-query checkpoint")
    parser.add_argument("target", type=Path, metavar="TARGET", help="folder to make; it must not exist")
    arguments = parser.parse_args()
    try:
        from model_prep.repeat_heads import repeat_kv_heads  # imports torch

        repeat_kv_heads(arguments.source, arguments.target.absolute())
    except (PrepareError, OSError) as error:
        print(f"repeat_kv_heads: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"repeat_kv_heads: error: {error}; run it with the project's environment: .venv/bin/python "
            "tools/repeat_kv_heads.py, after make venv",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("repeat_kv_heads: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(arguments.target.absolute())
    return 0


if __name__ == "__main__":
    sys.exit(main())
