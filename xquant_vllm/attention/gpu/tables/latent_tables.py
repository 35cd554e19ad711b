"""A latent as the kernels read it: bands of channels with one scale, and the matrix that each is multiplied by.

A latent is a row of streams, of the layer's own pages and of earlier layers' (latents.py). Keys and values are linear
in it, so a kernel goes through *bands*, dequantizes one after another and adds up the products; terms that are added
are bands that meet the same rows of the up-projection.

Within a band a token has one scale, so it need not enter the product: the product is over codes, which are small
integers, exact in BF16 and FP16, and the scale and the zero point follow::

    sum_c x_c U_c  =  scale * sum_c n_c A_c  +  zero * sum_c A_c  +  sum over outliers of x_o U_o

    kind        n_c                   A_c                  scale                        zero
    FP16        x_c itself            U_c                  1                            0
    uniform     code                  U_c                  FP16                         FP16
    allocated   2 code - levels       step_c / 2 * U_c     2 ** ((byte - 128) / 8)      0
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from xquant_vllm.attention.gpu.tables.bit_addresses import COLUMNS, bit_addresses
from xquant_vllm.attention.latents import LatentTerm
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.allocation import run_bytes
from xquant_vllm.codec.layout import PageLayout, StreamFormat

FP16, UNIFORM, ALLOCATED = 0, 1, 2
# Columns of a band's description, all offsets in bytes from the start of a page: which of the pages, codes of the
# head's first token, bytes from a token's codes to the next one's, kind, scales, zeros, outliers (of the band's first
# token), how many outlier channels lead the band, which table of bit addresses, and channels of the band.
FIELDS = ("page", "codes", "row_bytes", "kind", "scales", "zeros", "outliers", "num_outliers", "table", "channels")


@dataclass(frozen=True)
class Band:
    """What :data:`FIELDS` says of one band, and which rows of the latent it is.

    Attributes:
        fields: the numbers, ``table`` excepted.
        addresses: ``[6, channels]``, see :func:`bit_addresses`.
        first_row: its first channel within the latent.
        factor: ``[channels]``, FP32: by what the rows of the up-projection are multiplied.
    """

    fields: dict[str, int]
    addresses: torch.Tensor
    first_row: int
    factor: torch.Tensor


@dataclass(frozen=True)
class LatentTables:
    """Tensors that describe a latent, on the device of the up-projection.

    Attributes:
        bands: ``[num_bands, len(FIELDS)]`` int32, those of kv head 0 first.
        first_band: ``[num_kv_heads + 1]`` int32, at which band every kv head starts.
        addresses: ``[num_tables, 6, width]`` int32; channels beyond a band's have masks of 0.
        up: ``[num_bands, width, columns]``, in the dtype of the products: the A of every band.
        up_sum: ``[num_bands, columns]``, FP32: sums over the channels that are no outliers, of uniform bands.
        up_outliers: ``[num_bands, max(1, most_outliers), columns]``, FP32.
        width: channels of a band that kernels go by, a power of two of at least 16.
        most_bands: bands of a kv head, at most.
        most_outliers: outlier channels of a band, at most.
        kinds: which kinds of bands there are, as a sum of ``1 << kind``.
        high: whether any code has a high part.
    """

    bands: torch.Tensor
    first_band: torch.Tensor
    addresses: torch.Tensor
    up: torch.Tensor
    up_sum: torch.Tensor
    up_outliers: torch.Tensor
    width: int
    most_bands: int
    most_outliers: int
    kinds: int
    high: bool


def latent_bands(layouts: Sequence[PageLayout], terms: Sequence[LatentTerm], head: int, at_most: int) -> list[Band]:
    """Cut what a kv head reads into bands.

    Args:
        layouts: layouts of the pages.
        terms: the latent's terms.
        head: the kv head; a stream with one head is read by all of them.
        at_most: channels of a band, at most.
    """
    bands: list[Band] = []
    first_row, width_before = 0, 0
    for term in terms:
        layout = layouts[term.page]
        stream, at = layout.streams[term.stream], layout.offsets[term.stream]
        if not term.adds:
            first_row += width_before
            width_before = stream.width
        of_stream = head if stream.num_heads > 1 else 0
        if isinstance(stream, AllocatedFormat):
            scale_groups = _allocated(stream, of_stream, layout.block_size, at.codes, at.scales)
        else:
            sections = (at.codes, at.scales, at.zeros, at.outliers)
            scale_groups = _uniform(stream, of_stream, layout.block_size, sections)
        for scale_group in scale_groups:
            bands += _cut(scale_group, term.page, first_row, at_most)
    return bands


def _allocated(stream: AllocatedFormat, head: int, block_size: int, codes: int, scales: int) -> list[Band]:
    """The scale groups of an allocated stream's head, which has one."""
    codes += block_size * sum(map(run_bytes, stream.runs[:head]))
    runs = stream.runs[head]
    step, _, _ = channel_tables(runs)
    fields = {"codes": codes, "row_bytes": run_bytes(runs), "kind": ALLOCATED, "scales": scales + head * block_size}
    return [Band(fields, bit_addresses(runs), 0, step / 2)]


def _uniform(stream: StreamFormat, head: int, block_size: int, sections: tuple[int, int, int, int]) -> list[Band]:
    """The scale groups of a uniform stream's head, which are its groups."""
    codes, scales, zeros, outliers = sections
    size, row_bytes = stream.group_size, stream.row_bytes
    group_bytes = row_bytes // stream.num_groups
    scale_groups = []
    for group in range(stream.num_groups):
        parameter = 2 * block_size * (head * stream.num_groups + group)
        fields = {
            "codes": codes + head * block_size * row_bytes + group * group_bytes,
            "row_bytes": row_bytes,
            "kind": UNIFORM if stream.quantized else FP16,
            "scales": scales + parameter,
            "zeros": zeros + parameter,
        }
        if group == 0:
            fields["outliers"] = outliers + 2 * block_size * head * stream.outlier_channels
            fields["num_outliers"] = stream.outlier_channels
        scale_groups.append(Band(fields, bit_addresses([(stream.bits, size)]), group * size, torch.ones(size)))
    return scale_groups


def _cut(scale_group: Band, page: int, first_row: int, at_most: int) -> list[Band]:
    """A scale group's bands, placed in the latent."""
    bands = []
    channels = scale_group.addresses.shape[1]
    for begin in range(0, channels, at_most):
        end = min(begin + at_most, channels)
        outliers = min(max(scale_group.fields.get("num_outliers", 0) - begin, 0), end - begin)
        if 0 < outliers < scale_group.fields["num_outliers"]:
            raise ValueError(
                f"setting 'outlier_channels': {scale_group.fields['num_outliers']} cannot work on this model: kernels "
                f"for GPUs take {at_most} channels at a time; set {at_most} or fewer"
            )
        fields = scale_group.fields | {"page": page, "num_outliers": outliers, "channels": end - begin}
        bands.append(
            Band(
                fields,
                scale_group.addresses[:, begin:end],
                first_row + scale_group.first_row + begin,
                scale_group.factor[begin:end],
            )
        )
    return bands


def band_factors(
    layouts: Sequence[PageLayout], terms: Sequence[LatentTerm], num_kv_heads: int, columns: int
) -> torch.Tensor:
    """What the numbers n of one band are multiplied by, besides a token's scale, to be channels of a latent.

    Args:
        layouts: layouts of the pages.
        terms: the latent's terms, which are one band for every kv head.
        num_kv_heads: kv heads.
        columns: of the result, at least the latent's channels.

    Returns:
        ``[num_kv_heads, columns]``, FP32; 0 for channels that are not stored.
    """
    factors = torch.zeros(num_kv_heads, columns)
    for head in range(num_kv_heads):
        (band,) = latent_bands(layouts, terms, head, columns)
        factors[head, : band.factor.numel()] = band.factor
    return factors


def latent_tables(
    layouts: Sequence[PageLayout],
    terms: Sequence[LatentTerm],
    up: torch.Tensor,
    dtype: torch.dtype,
    at_most: int = 128,
) -> LatentTables:
    """Describe a latent to the kernels.

    Args:
        layouts: layouts of the pages.
        terms: the latent's terms.
        up: ``[num_kv_heads, width, columns]``, FP32: what the latent is multiplied by, the columns as kernels want
            them.
        dtype: of the products' operands.
        at_most: channels of a band, at most; a power of two.

    Raises:
        ValueError: outlier channels do not fit a band.
    """
    device, heads = up.device, up.shape[0]
    of_heads = [latent_bands(layouts, terms, head, at_most) for head in range(heads)]
    every = [band for of_head in of_heads for band in of_head]
    width = max(16, triton.next_power_of_2(max(band.addresses.shape[1] for band in every)))
    most_outliers = max(band.fields["num_outliers"] for band in every)
    tables: dict[bytes, int] = {}
    addresses: list[torch.Tensor] = []
    rows = torch.zeros(len(every), len(FIELDS), dtype=torch.int32)
    scaled = torch.zeros(len(every), width, up.shape[2], device=device)
    sums = torch.zeros(len(every), up.shape[2], device=device)
    outliers = torch.zeros(len(every), max(1, most_outliers), up.shape[2], device=device)
    index = 0
    for head, of_head in enumerate(of_heads):
        for band in of_head:
            channels = band.addresses.shape[1]
            padded = torch.nn.functional.pad(band.addresses, (0, width - channels))
            table = tables.setdefault(padded.numpy().tobytes(), len(addresses))
            if table == len(addresses):
                addresses.append(padded)
            fields = band.fields | {"table": table}
            rows[index] = torch.tensor([fields.get(name, 0) for name in FIELDS])
            of_rows = up[head, band.first_row : band.first_row + channels]
            own = band.fields["num_outliers"]
            scaled[index, :channels] = of_rows * band.factor.to(device).unsqueeze(1)
            # The code of an outlier channel is 0, and what is stored beside the codes takes its place. Rows are rounded
            # as for the product: scale times code and zero point nearly cancel, so what rounding does to both must.
            if band.fields["kind"] == UNIFORM:
                sums[index] = of_rows[own:].to(dtype).float().sum(0)
            outliers[index, :own] = of_rows[:own]
            index += 1
    starts = torch.tensor([0, *(len(of_head) for of_head in of_heads)]).cumsum(0)
    assert addresses[0].shape[0] == len(COLUMNS)
    return LatentTables(
        bands=rows.to(device),
        first_band=starts.to(device, torch.int32),
        addresses=torch.stack(addresses).to(device),
        up=scaled.to(dtype),
        up_sum=sums,
        up_outliers=outliers,
        width=width,
        most_bands=max(map(len, of_heads)),
        most_outliers=most_outliers,
        kinds=sum(1 << kind for kind in {band.fields["kind"] for band in every}),
        high=any(int(table[COLUMNS.index("high_mask")].any()) for table in addresses),
    )
