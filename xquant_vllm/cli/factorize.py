"""``xquant factorize``: from arguments to options, and what is said of the folder."""

import argparse
import shlex

from xquant_vllm.offline.factorize import FactorizeOptions, factorize


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.factorize_arguments` parsed.

    Raises:
        XQuantError: see :func:`xquant_vllm.offline.factorize.factorize`.
    """
    header = factorize(
        FactorizeOptions(
            model=options.model,
            out=options.out,
            calibration=options.calibration,
            calibration_tokens=options.calibration_tokens,
            bits=None if options.bits is None else tuple(options.bits),
            method=options.method,
            anchor_interval=options.anchor_interval,
            first_layers=options.first_layers,
            basis=options.basis,
            outlier_channels=None if options.outlier_channels is None else tuple(options.outlier_channels),
            rotate=options.rotate,
            dtype=options.dtype,
            device=options.device,
            force=options.force,
        )
    )
    source = header.source
    if header.calibration is None and source.hidden_size < 2 * source.kv_heads * source.head_size:
        print(
            "note: on one rank the layer input of this model is cached, which needs no factors; they serve the setting "
            '"cache": "latent", and several tensor-parallel ranks'
        )
    print(f"wrote {options.out}; serve it with: vllm serve {shlex.quote(str(options.out))} --attention-backend xquant")
