"""Calibrated up-projections before they were fitted to what rounded latents read back as.

The fit (:mod:`xquant_vllm.projection.refit`) moves them away from the inverse of the down-projections, so that
keys of exact latents are no longer the model's own. A proof that compares these needs the inverse.
"""

from dataclasses import replace

import torch

from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.projection.basis import left_inverse
from xquant_vllm.scheme.builder import LayerParameters
from xquant_vllm.scheme.layer_scheme import LayerScheme


def unfitted(scheme: LayerScheme, down: torch.Tensor | None, parameters: LayerParameters) -> LayerScheme:
    """The scheme with up-projections that give back the weights; itself, unless it was calibrated.

    Args:
        scheme: with up-projections of values.
        down: its down-projections, see :meth:`xquant_vllm.scheme.builder.SchemeBuilder.build`.
        parameters: the layer's weights.
    """
    form = scheme.format
    if down is None or not isinstance(form.streams[0], AllocatedFormat):
        return scheme
    heads, size = form.shape.num_kv_heads, form.shape.head_size
    weights = [weight.to(torch.float64).unflatten(0, (heads, size)).mT for weight in (parameters.key, parameters.value)]
    if form.holds == "latents":
        downs = down.unflatten(0, (2, heads, size)).mT
        key, value = (left_inverse(of, weight) for of, weight in zip(downs, weights, strict=True))
    else:
        # One latent, whose rows follow those of earlier layers' latents, which stay.
        width = form.streams[0].width
        columns = torch.cat([weight.transpose(0, 1).flatten(1) for weight in weights], 1)
        own = left_inverse(down[:width].T.unsqueeze(0), columns.unsqueeze(0))[0]
        key, value = (part.unflatten(1, (heads, size)).transpose(0, 1) for part in own.chunk(2, 1))
    projection = scheme.projection
    assert projection.up_value is not None
    ups = []
    for fitted, inverse in ((projection.up_key, parameters.up_key(key.float())), (projection.up_value, value.float())):
        ups.append(torch.cat((fitted[:, : fitted.shape[1] - inverse.shape[1]], inverse.to(fitted)), 1))
    return replace(scheme, projection=replace(projection, up_key=ups[0], up_value=ups[1]))
