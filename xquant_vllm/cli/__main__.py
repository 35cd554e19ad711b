"""``python -m xquant_vllm.cli``, the same as ``xquant``."""

import sys

from xquant_vllm.cli.main import main

sys.exit(main())
