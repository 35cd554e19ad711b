"""The model that the drawings speak of, SmolLM2-135M, and its pages: 3 kv heads of 64 channels, 576 wide."""

from xquant_vllm.codec.layout import PageLayout, StreamFormat

HIDDEN, KV_HEADS, HEAD_SIZE, BITS = 576, 3, 64, 4
# Of vLLM on a GPU; on CPUs they are larger. Everything in a page grows alike.
BLOCK_SIZE = 16

# The default settings: one scale group for a latent head, and an outlier channel in those of keys.
PAGE = PageLayout(
    (
        StreamFormat(KV_HEADS, HEAD_SIZE, BITS, HEAD_SIZE, outlier_channels=1),
        StreamFormat(KV_HEADS, HEAD_SIZE, BITS, HEAD_SIZE),
    ),
    BLOCK_SIZE,
)
SIXTEEN_BIT_BYTES = 2 * KV_HEADS * HEAD_SIZE * 2  # keys and values of a token in a layer


def sections() -> list[tuple[str, int, int]]:
    """The sections of a page: what it is, its first byte, and its bytes. In their order; empty ones are left out."""
    found = []
    for name, stream, at in zip(("keys", "values"), PAGE.streams, PAGE.offsets, strict=True):
        scales, zeros, outliers = (BLOCK_SIZE * size for size in stream.parameter_bytes)
        found.append((f"codes of {name}", at.codes, BLOCK_SIZE * stream.code_bytes))
        found.append((f"scales of {name}", at.scales, scales))
        found.append((f"zero points of {name}", at.zeros, zeros))
        found.append((f"outlier channels of {name}", at.outliers, outliers))
    return sorted((section for section in found if section[2]), key=lambda section: section[1])
