"""Device functions: what the scale of a token in an allocated stream stands for, as codec/allocated.py says."""

import triton
import triton.language as tl

from xquant_vllm.codec.allocated import SCALE_BIAS, SCALES_PER_OCTAVE

BIAS = tl.constexpr(SCALE_BIAS)
PER_OCTAVE = tl.constexpr(SCALES_PER_OCTAVE)


@triton.jit
def scale_value(scale):
    """Of scales, whole numbers in FP32 from 1 to 255: what codes are multiplied by, FP32."""
    return tl.exp2((scale - BIAS) / PER_OCTAVE)
