"""The layouts of KIVI's two kinds of pages: which byte of a block means what.

A *quantized* page holds ``block_size`` tokens of one layer, a whole number of key groups. Keys share a scale and a zero
point per channel and group of ``key_group_size`` successive tokens, values per token and group of ``value_group_size``
channels of a head. Structure of arrays; N tokens, H kv heads of D channels, b bits::

    | key codes | value codes | key scales | key zeros | value scales | value zeros | padding |

    key codes      [H, N, packed_size(D, b)]                                        uint8, see codec/packing.py
    value codes    [H, N, D / value_group_size, packed_size(value_group_size, b)]   uint8
    key scales     [H, N / key_group_size, D]                                       FP16
    key zeros      [H, N / key_group_size, D]                                       FP16
    value scales   [H, D / value_group_size, N]                                     FP16
    value zeros    [H, D / value_group_size, N]                                     FP16

A token's key codes are a row of D channels packed as one group, so a kernel unpacks rows of tokens as it does values,
and multiplies by a row of scales. Values are a uniform stream of ``codec/layout.py``. Every section starts at a
multiple of 16 bytes. vLLM counts whole bytes per token: where scales take a fraction of one, the page is padded at its
end, and ``bytes_per_token`` counts that. Example: 3 heads of 64, 4 bits, groups of 32:
``3*32 + 3*32 + 3*64*4/32 + 3*2*4 = 240`` bytes per token and layer.

A *residual* page holds the most recent tokens as the model computed them::

    keys           [H, N, D]     the model's dtype
    values         [H, N, D]     the model's dtype
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE, StreamFormat, StreamOffsets
from xquant_vllm.codec.packing import packed_size

KIVI_BITS = (4, 2)
RESIDUAL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP16_BYTES = 2


@dataclass(frozen=True)
class QuantizedLayout:
    """Layout of a page of codes; see the drawing above.

    Attributes:
        num_kv_heads: kv heads H.
        head_size: channels D of a head, a multiple of 8.
        bits: bits per code: 4 or 2.
        key_group_size: successive tokens that share a scale and a zero point per key channel; a multiple of 16.
        value_group_size: channels that share them per token and value head; a multiple of 8 that divides ``head_size``.
        block_size: tokens N per page, a multiple of ``key_group_size``.
    """

    num_kv_heads: int
    head_size: int
    bits: int
    key_group_size: int
    value_group_size: int
    block_size: int

    def __post_init__(self) -> None:
        """Refuse what cannot be packed or would misalign a section."""
        if self.bits not in KIVI_BITS:
            raise ValueError(f"bits = {self.bits} is not supported: set one of {', '.join(map(str, KIVI_BITS))}")
        if self.head_size <= 0 or self.head_size % 8:
            raise ValueError(f"heads of {self.head_size} channels cannot be packed: they must be a multiple of 8")
        if self.key_group_size <= 0 or self.key_group_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"group_size = {self.key_group_size} does not fit pages, which are read {BLOCK_SIZE_MULTIPLE} tokens "
                f"at a time: set a positive multiple of {BLOCK_SIZE_MULTIPLE}"
            )
        if self.block_size <= 0 or self.block_size % self.key_group_size:
            raise ValueError(
                f"block_size = {self.block_size} would split a group of keys: set a multiple of {self.key_group_size}"
            )
        _ = self.value_stream  # refuses groups of channels that do not fit

    @cached_property
    def value_stream(self) -> StreamFormat:
        """The values' part of the page."""
        return StreamFormat(self.num_kv_heads, self.head_size, self.bits, self.value_group_size)

    @property
    def key_row_bytes(self) -> int:
        """Bytes of the key codes of one token and head."""
        return packed_size(self.head_size, self.bits)

    @property
    def num_key_groups(self) -> int:
        """Groups of keys per page."""
        return self.block_size // self.key_group_size

    @property
    def _key_parameter_bytes(self) -> int:
        """Bytes of the key scales (or zeros) of a page."""
        return self.num_kv_heads * self.num_key_groups * self.head_size * _FP16_BYTES

    @property
    def content_bytes(self) -> int:
        """Bytes of a page without padding."""
        keys = self.num_kv_heads * self.block_size * self.key_row_bytes + 2 * self._key_parameter_bytes
        return keys + self.block_size * self.value_stream.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and layer, everything counted, also padding."""
        return -(-self.content_bytes // self.block_size)

    @property
    def page_bytes(self) -> int:
        """Bytes per page."""
        return self.block_size * self.bytes_per_token

    @property
    def key_codes_at(self) -> int:
        """Byte offset of the key codes."""
        return 0

    @property
    def key_scales_at(self) -> int:
        """Byte offset of the key scales."""
        return self.block_size * (self.num_kv_heads * self.key_row_bytes + self.value_stream.code_bytes)

    @property
    def key_zeros_at(self) -> int:
        """Byte offset of the key zeros."""
        return self.key_scales_at + self._key_parameter_bytes

    @cached_property
    def values_at(self) -> StreamOffsets:
        """Byte offsets of the values' sections."""
        codes = self.block_size * self.num_kv_heads * self.key_row_bytes
        scales, zeros, _ = (self.block_size * size for size in self.value_stream.parameter_bytes)
        start = self.key_zeros_at + self._key_parameter_bytes
        assert start + scales + zeros == self.content_bytes
        return StreamOffsets(codes, start, start + scales, start + scales + zeros)


@dataclass(frozen=True)
class ResidualLayout:
    """Layout of a page of keys and values as the model computed them.

    Attributes:
        num_kv_heads: kv heads H.
        head_size: channels D of a head.
        dtype: bfloat16, float16 or float32.
        block_size: tokens N per page, a multiple of 16.
    """

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    block_size: int

    def __post_init__(self) -> None:
        """Refuse other dtypes and misaligned pages."""
        if self.dtype not in RESIDUAL_DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in RESIDUAL_DTYPES)
            raise ValueError(f"a residual in {self.dtype} is not supported: serve the model in one of {names}")
        if self.block_size <= 0 or self.block_size % BLOCK_SIZE_MULTIPLE:
            raise ValueError(
                f"block_size = {self.block_size} would misalign the residual's pages: "
                f"set a multiple of {BLOCK_SIZE_MULTIPLE}"
            )

    @property
    def bytes_per_token(self) -> int:
        """Bytes per token and layer."""
        return 2 * self.num_kv_heads * self.head_size * self.dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes per page."""
        return self.block_size * self.bytes_per_token

    @property
    def values_at(self) -> int:
        """Byte offset of the values; keys start at 0."""
        return self.page_bytes // 2
