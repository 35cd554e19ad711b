"""The numbers by which the C interfaces of the compiled kernels name dtypes."""

import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}
"""As in csrc/cpu/api.h, which has no INT8, and in csrc/cuda/common/numbers.h."""
