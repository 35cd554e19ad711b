"""What a user may say about a method, and what is refused because it has no use with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.methods.method_names import NO_CALIBRATION, SERVED_METHODS
from xquant_vllm.offline.option_values import at_least, bits_value, spaced

_BASELINE_BITS = (8, 4, 3, 2)
_DEFAULT_BITS = 4


@dataclass(frozen=True)
class MethodOptions:
    """Options as given; None where they are not.

    Attributes:
        bits: one number, or one for keys and one for values.
        group_size: numbers that share a scale and a zero point.
        residual: recent tokens kept in 16 bit (KIVI).
        basis: basis of latents.
        settings: further settings of the server, by name.
        calibration: text to calibrate on: a file, ``python-docs`` or ``none``.
        calibration_tokens: tokens of it.
    """

    bits: tuple[int, ...] | None = None
    group_size: int | None = None
    residual: int | None = None
    basis: str | None = None
    settings: Mapping[str, Any] | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None

    def check(self, method: str) -> None:
        """Refuse what has no use with a method.

        Raises:
            RefusedError: it names the option.
        """
        kivi, served = method in ("kivi", "kivi-pre-rope"), method in SERVED_METHODS
        for option, value, useful, where in (
            ("--group-size", self.group_size, kivi or served, "of kivi, kivi-pre-rope, xquant and xquant-cl"),
            ("--residual", self.residual, method == "kivi", "of kivi"),
            ("--basis", self.basis, method == "xquant", "of xquant"),
            ("--settings", self.settings, served, "of xquant and xquant-cl"),
            ("--calibration", self.calibration, served, "of xquant and xquant-cl"),
            ("--calibration-tokens", self.calibration_tokens, served, "of xquant and xquant-cl"),
        ):
            if value is not None and not useful:
                raise RefusedError(
                    f"xquant: {option} has no use with --method {method}: it is an option {where}; leave it out"
                )
        if self.calibration == NO_CALIBRATION and self.calibration_tokens is not None:
            raise RefusedError(
                f"xquant: --calibration-tokens has no use with --calibration {NO_CALIBRATION}; leave one of them out"
            )
        if kivi:
            at_least("--group-size", self.group_size, 1, ", for example 128")
        at_least("--residual", self.residual, 0, " (0 for none; published is 128)")

    def baseline_bits(self, method: str) -> int:
        """The bits of a method that is not served, 4 if none are given.

        Raises:
            RefusedError: it has no such bits.
        """
        bits = self.bits or (_DEFAULT_BITS,)
        if len(bits) != 1 or bits[0] not in _BASELINE_BITS:
            raise RefusedError(
                f"xquant: --bits {spaced(bits)} cannot work with --method {method}, which has one number "
                f"of bits for all; set one of {', '.join(map(str, _BASELINE_BITS))}"
            )
        return bits[0]

    def server_settings(self, method: str) -> dict[str, Any]:
        """The settings as a server would be given them.

        Raises:
            RefusedError: an option and ``--settings`` contradict each other, or the cache would not be read.
        """
        given: dict[str, Any] = {"method": method}
        if self.bits is not None:
            given["bits"] = bits_value("--bits", self.bits)
        given |= {
            name: value for name, value in (("basis", self.basis), ("group_size", self.group_size)) if value is not None
        }
        for name, value in (self.settings or {}).items():
            if name in given and given[name] != value:
                raise RefusedError(
                    f"xquant: --settings has {name!r}: {value!r}, but --{name.replace('_', '-')} says "
                    f"{given[name]!r}; leave one of them out"
                )
            given[name] = value
        if given.get("prompt", "cached") != "cached":
            raise RefusedError(
                f"xquant: --settings has 'prompt': {given['prompt']!r}, with which a prompt does not read its own "
                'tokens from the cache, so the result would tell nothing of the cache; set "cached" or leave it out'
            )
        if "calibration" in given:
            raise RefusedError(
                f"xquant: --settings has 'calibration': {given['calibration']!r}, which is an option here; give "
                "--calibration instead"
            )
        if given.get("hot"):
            raise RefusedError(
                f"xquant: --settings has 'hot': {given['hot']!r}, but evaluations read every token from its page: a "
                "pool of hot blocks holds the same; set 0 or leave it out"
            )
        return given
