"""From settings to the number format of one layer's pages."""

from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.integration.settings import SettingsError, XQuantSettings
from xquant_vllm.projection.basis import latent_shape

_LARGEST_DEFAULT_GROUP = 128


def stream_formats(
    settings: XQuantSettings, layer_index: int, num_kv_heads: int, head_size: int
) -> tuple[StreamFormat, StreamFormat]:
    """Formats of a layer's key and value latents.

    Args:
        settings: the user's settings.
        layer_index: the layer, counted from the model's first.
        num_kv_heads: kv heads on this rank.
        head_size: channels of a head.

    Raises:
        SettingsError: the settings do not fit the model.
    """
    latent_heads, width = latent_shape(num_kv_heads, head_size, settings.basis)
    group_size = settings.group_size or _default_group_size(width)
    if width % group_size:
        raise SettingsError(
            f"xquant: setting 'group_size': {group_size} cannot work: it does not divide the {width} channels of a "
            f"latent head (basis {settings.basis!r}); set one of {_choices(width)}, or leave it out"
        )
    for stream in ("key", "value"):
        outliers = getattr(settings.outlier_channels, stream)
        if outliers >= group_size:
            raise SettingsError(
                f"xquant: setting 'outlier_channels': {outliers} ({stream}) cannot work: a group of {group_size} "
                f"channels would have nothing left to quantize; set 0 to {group_size - 1}, 1 suits every model tried"
            )
    bits = settings.bits_of_layer(layer_index)
    outlier = settings.outlier_channels
    return (
        StreamFormat(latent_heads, width, bits.key, group_size, outlier.key),
        StreamFormat(latent_heads, width, bits.value, group_size, outlier.value),
    )


def _choices(width: int) -> str:
    return ", ".join(str(size) for size in range(8, width + 1, 8) if width % size == 0)


def _default_group_size(width: int) -> int:
    sizes = [size for size in range(8, min(width, _LARGEST_DEFAULT_GROUP) + 1, 8) if width % size == 0]
    if not sizes:
        raise SettingsError(
            f"xquant: a latent head of {width} channels cannot be packed into whole bytes: the model's head size must "
            "be a multiple of 8; choose another --attention-backend for this model"
        )
    return sizes[-1]
