"""What an operation must do at least: bytes that it reads or writes, and multiply-adds, by the kind of number.

A multiply-add is what one lane of one fused multiply-add instruction does. Counted is what the mathematics asks for,
not what the kernel spends on it: no unpacking of codes, no conversions, no address arithmetic.
"""

from dataclasses import dataclass

from xquant_vllm.attention.cpu import library as cpu
from xquant_vllm.attention.cpu.plan import prepare
from xquant_vllm.attention.plan import AttentionLayerPlan

# Of the polynomial and the scaling of an exponential.
_EXPONENTIAL = 10


@dataclass(frozen=True)
class Work:
    """Of one operation.

    Attributes:
        bytes: read and written.
        fp32: multiply-adds.
        int16: likewise, two of which a lane does at once.
        int8: likewise, four.
    """

    bytes: float
    fp32: float = 0.0
    int16: float = 0.0
    int8: float = 0.0


def decode_work(plan: AttentionLayerPlan, sequences: int, context: int) -> Work:
    """Attention of one query token of every sequence, by the kernels for the instruction set in use.

    Counted for every cached token and kv head: keys from codes (in integers where the kernels do so), scale, zero and
    outliers of a key, RoPE (two multiply-adds a channel), scores and the softmax of the group's queries, and values
    weighed as latents. Scores count as FP32, also with AMX, which has them in BF16. What is done once per sequence,
    such as the value up-projection, is left out.
    """
    projection = plan.projection
    kv_heads, size = projection.num_kv_heads, projection.head_size
    group = plan.num_heads // kv_heads
    width, value_width = projection.up_key.shape[1], projection.value_width
    integers = cpu.multiplies_integers()
    fp32 = kv_heads * (2.0 * size + group * size + group * _EXPONENTIAL)
    int16 = int8 = 0.0
    if integers:
        words, scale_groups = _key_words(plan)
        int16 += words * size
        int8 += (kv_heads * width - words) * size
        fp32 += (2 * scale_groups + kv_heads * plan.layout.streams[0].outlier_channels) * size
        int8 += 2 * kv_heads * group * value_width  # weights are of two integers
    else:
        fp32 += kv_heads * (width * size + group * value_width)
    tokens = sequences * context
    return Work(tokens * plan.layout.bytes_per_token, tokens * fp32, tokens * int16, tokens * int8)


def _key_words(plan: AttentionLayerPlan) -> tuple[int, int]:
    """Channels of all kv heads' keys that have integers of 16 bits, and scale groups of all kv heads."""
    prepared = prepare(plan, *cpu.products())
    if prepared.byte_keys is not None:  # one product of all channels
        return 0, plan.projection.num_kv_heads
    keys = prepared.integer_keys
    assert keys is not None
    return int(keys.words.sum()), keys.words.numel()


def store_work(plan: AttentionLayerPlan, tokens: int) -> Work:
    """Storing BF16 inputs: they are read, and a slot is written, once each."""
    inputs = sum(2 * stream.num_heads * stream.width for stream in plan.layout.streams)
    return Work(tokens * (inputs + plan.layout.bytes_per_token))


def plain_decode_bytes(heads: int, head_size: int, sequences: int, context: int) -> int:
    """Keys and values that a BF16 cache reads."""
    return sequences * context * 2 * heads * head_size * 2


@dataclass(frozen=True)
class Roofs:
    """What this machine reached in the same run, with the same threads.

    Attributes:
        bytes_per_second: of a copy, counting bytes read and bytes written.
        fp32: multiply-adds a second of a large FP32 matrix product.
        int8: likewise of an INT8 one.
    """

    bytes_per_second: float
    fp32: float
    int8: float

    def seconds(self, work: Work) -> tuple[float, str]:
        """The least time, and what binds it: ``"memory"`` or ``"arithmetic"``.

        Products of 16 bits run at half the rate of those of 8 bits: a lane does two instead of four.
        """
        memory = work.bytes / self.bytes_per_second
        arithmetic = work.fp32 / self.fp32 + (work.int16 * 2 + work.int8) / self.int8
        return (memory, "memory") if memory > arithmetic else (arithmetic, "arithmetic")
