"""The bits of all layers' channels, drawn."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xquant_vllm.errors import RefusedError

_DOTS_PER_INCH = 150


def plot_bits(facts: Mapping[str, Any], path: Path) -> None:
    """Write a picture: for every stream a map of layers and channels, and the bytes of every layer beside it.

    Args:
        facts: see :func:`xquant_vllm.diagnosis.factors.described.describe_factors`.
        path: a PNG file; written beside its place and renamed.

    Raises:
        RefusedError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RefusedError(
            "xquant: --plot needs matplotlib, which is not installed; pip install matplotlib, or leave the option out"
        ) from None
    layers = facts["layers"]
    streams = [stream["of"] for stream in layers[0]["streams"]]
    figure = Figure(figsize=(4 + 4 * len(streams), 2 + 0.12 * len(layers)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(streams) + 1, squeeze=False)[0]
    image = None
    for index, (axis, name) in enumerate(zip(axes, streams, strict=False)):
        image = axis.imshow(
            [layer["streams"][index]["bits"] for layer in layers],
            aspect="auto",
            vmin=0,
            vmax=8,
            interpolation="nearest",
        )
        axis.set(title=f"bits of {name}", xlabel="channel, the most important first", ylabel="layer")
    assert image is not None  # a layer has a stream
    figure.colorbar(image, ax=axes[len(streams) - 1], label="bits")
    numbers = [layer["layer"] for layer in layers]
    axes[-1].barh(numbers, [layer["bytes_per_token_16bit"] for layer in layers], color="lightgray", label="16 bit")
    axes[-1].barh(numbers, [layer["bytes_per_token"] for layer in layers], label="this cache")
    axes[-1].invert_yaxis()
    axes[-1].set(title="bytes per token", xlabel="bytes", ylabel="layer")
    axes[-1].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=path.absolute().parent)
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format="png", dpi=_DOTS_PER_INCH)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
