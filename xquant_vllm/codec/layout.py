"""The page layout: the one place that knows which byte of a block means what.

A page holds ``block_size`` slots (tokens) of one layer. It carries one or more *streams* (key latents, value latents);
a stream is ``num_heads`` latent heads of ``width`` channels. Structure of arrays, so that a kernel loads a tile of
tokens with contiguous reads::

    | codes of stream 0 | codes of stream 1 | scales 0 | zeros 0 | outliers 0 | scales 1 | zeros 1 | outliers 1 |

A *uniform* stream has the same bits in all channels (quantizer.py)::

    codes      [num_heads, block_size, groups, packed_size(group_size, bits)]    uint8, see packing.py
    scales     [num_heads, groups, block_size]                                   FP16
    zeros      [num_heads, groups, block_size]                                   FP16
    outliers   [num_heads, outlier_channels, block_size]                         FP16

At 16 bits it is not quantized: its "codes" are the FP16 numbers, and it has no scales and zeros. An *allocated* stream
has runs of channels with different bits, the most first, and one scale for a token's latent head (allocated.py)::

    codes      per head [block_size, bytes of its runs, one after another]       uint8, a run packed like a group
    scales     [num_heads, block_size]                                           uint8

``block_size`` is a multiple of 16, so every section starts at a multiple of 16 bytes and nothing is padding:
``bytes_per_token`` is exactly codes + scales + zeros + outliers, and a page is ``block_size * bytes_per_token`` bytes.
Example: 3 heads of 64, 4 bits, groups of 64, one outlier channel in the keys:
``3*32 + 3*32 + 3*2 + 3*2 + 3*2 + 3*2 + 3*2 = 222`` bytes per token and layer; BF16 keys and values take 768.
"""

from dataclasses import dataclass
from functools import cached_property

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.packing import UNQUANTIZED_BITS, packed_size

BLOCK_SIZE_MULTIPLE = 16
# Of a stream with the same bits in all channels.
UNIFORM_BITS = (16, 8, 4, 3, 2)
_FP16_BYTES = 2


@dataclass(frozen=True)
class StreamFormat:
    """Number format of one stream of latents.

    Attributes:
        num_heads: latent heads: kv heads with one basis per head, 1 with a joint basis.
        width: channels per latent head.
        bits: bits per code: 8, 4, 3 or 2; 16 keeps FP16 numbers.
        group_size: channels sharing a scale and a zero point; divides ``width``, a multiple of 8.
        outlier_channels: leading channels of every latent head kept in FP16; fewer than ``group_size``, 0 at 16 bits.
    """

    num_heads: int
    width: int
    bits: int
    group_size: int
    outlier_channels: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be packed."""
        if self.bits not in UNIFORM_BITS:
            raise ValueError(f"bits = {self.bits} is not supported: set one of {', '.join(map(str, UNIFORM_BITS))}")
        if self.group_size <= 0 or self.group_size % 8:
            raise ValueError(f"group_size = {self.group_size} cannot be packed: set a positive multiple of 8")
        if self.width % self.group_size:
            raise ValueError(
                f"group_size = {self.group_size} does not divide the {self.width} channels of a latent head: "
                f"set a divisor of {self.width} that is a multiple of 8"
            )
        if not 0 <= self.outlier_channels < self.group_size:
            raise ValueError(
                f"outlier_channels = {self.outlier_channels} is out of range: "
                f"set 0 to {self.group_size - 1} (group_size - 1)"
            )
        if not self.quantized and self.outlier_channels:
            raise ValueError(f"outlier_channels = {self.outlier_channels} with 16 bits, which keep all in FP16: set 0")

    @property
    def quantized(self) -> bool:
        """Whether there are codes with scales and zeros, not FP16 numbers."""
        return self.bits != UNQUANTIZED_BITS

    @property
    def num_groups(self) -> int:
        """Groups per latent head."""
        return self.width // self.group_size

    @property
    def num_scales(self) -> int:
        """Scales (and zeros) per token and latent head."""
        return self.num_groups if self.quantized else 0

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of one token and latent head."""
        return self.num_groups * packed_size(self.group_size, self.bits)

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one token, all latent heads."""
        return self.num_heads * self.row_bytes

    @property
    def parameter_bytes(self) -> tuple[int, int, int]:
        """Bytes of the scales, the zeros and the outliers of one token, all latent heads."""
        scales = self.num_heads * self.num_scales * _FP16_BYTES
        return scales, scales, self.num_heads * self.outlier_channels * _FP16_BYTES

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token, all latent heads: codes, scales, zeros and outliers."""
        return self.code_bytes + sum(self.parameter_bytes)


Stream = StreamFormat | AllocatedFormat


@dataclass(frozen=True)
class StreamOffsets:
    """Byte offsets of a stream's sections from the start of a page."""

    codes: int
    scales: int
    zeros: int
    outliers: int


@dataclass(frozen=True)
class PageLayout:
    """Layout of one page; see the drawing above.

    Attributes:
        streams: the streams in a page, in order (keys, then values).
        block_size: slots per page, a multiple of 16.
    """

    streams: tuple[Stream, ...]
    block_size: int

    def __post_init__(self) -> None:
        """Refuse block sizes that would misalign a section."""
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block_size = {self.block_size} would misalign the page's sections: "
                f"set a multiple of {BLOCK_SIZE_MULTIPLE}"
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and layer, everything counted."""
        return sum(stream.bytes_per_token for stream in self.streams)

    @property
    def page_bytes(self) -> int:
        """Bytes per page."""
        return self.block_size * self.bytes_per_token

    @cached_property
    def offsets(self) -> tuple[StreamOffsets, ...]:
        """Section offsets of every stream."""
        codes, at = [], 0
        for stream in self.streams:
            codes.append(at)
            at += self.block_size * stream.code_bytes
        result = []
        for stream, code_offset in zip(self.streams, codes, strict=True):
            scales, zeros, outliers = (self.block_size * size for size in stream.parameter_bytes)
            result.append(StreamOffsets(code_offset, at, at + scales, at + scales + zeros))
            at += scales + zeros + outliers
        assert at == self.page_bytes
        return tuple(result)
