"""``xquant factorize``: from arguments to options, and what is said of the folder."""

import argparse
import shlex

from xquant_vllm.cli.certify import certifying
from xquant_vllm.cli.factorize_search import search
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.factorize import FactorizeOptions, factorize
from xquant_vllm.offline.texts import read_file


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.factorize_arguments` parsed.

    Raises:
        XQuantError: see :func:`xquant_vllm.offline.factorize.factorize`.
    """
    _check(options)
    asked = FactorizeOptions(
        model=options.model,
        out=options.out,
        calibration=options.calibration,
        calibration_tokens=options.calibration_tokens,
        bits=None if options.bits is None else tuple(options.bits),
        method=options.method or "xquant",
        anchor_interval=options.anchor_interval,
        first_layers=options.first_layers,
        basis=options.basis,
        outlier_channels=None if options.outlier_channels is None else tuple(options.outlier_channels),
        rotate=options.rotate,
        dtype=options.dtype,
        device=options.device,
        force=options.force,
    )
    text = options.certificate_text
    if options.max_kl is not None:
        chosen = options.method is not None or options.basis is not None
        header = search(asked, options.max_kl, text, chosen=chosen)
    elif options.certificate:
        header = factorize(asked, certifying(asked, text, demanded=text is not None))
    else:
        header = factorize(asked)
    source = header.source
    if header.calibration is None and source.hidden_size < 2 * source.kv_heads * source.head_size:
        print(
            "note: on one rank the layer input of this model is cached, which needs no factors; they serve the setting "
            '"cache": "latent", and several tensor-parallel ranks'
        )
    if header.certificate is not None:
        print(f"measured {header.certificate.describe()}")
    print(f"wrote {options.out}; serve it with: vllm serve {shlex.quote(str(options.out))} --attention-backend xquant")


def _check(options: argparse.Namespace) -> None:
    """Refuse options that have no use together.

    Raises:
        RefusedError: it names them.
    """
    if options.certificate_text is not None and not options.certificate:
        raise RefusedError("xquant: --certificate-text has no use with --no-certificate; leave one of them out")
    if options.certificate_text is not None:
        # Now, and not when all is calibrated.
        read_file("--certificate-text", options.certificate_text)
    if options.max_kl is None:
        return
    if not options.max_kl > 0:
        raise RefusedError(f"xquant: --max-kl {options.max_kl:g} cannot work; set more than 0, such as 0.02")
    for name, given, instead in (
        ("--bits", options.bits is not None, "which it searches; leave one of them out"),
        ("--no-certificate", not options.certificate, "which is a bound on what is measured; leave one of them out"),
    ):
        if given:
            raise RefusedError(f"xquant: {name} cannot work with --max-kl, {instead}")
    if options.calibration is None:
        raise RefusedError(
            "xquant: --max-kl chooses among calibrated caches; give --calibration TEXT_FILE (or mixed-text)"
        )
