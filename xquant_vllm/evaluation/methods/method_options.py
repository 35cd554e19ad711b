"""What a user may say about a method, and what is refused because it has no use with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xquant_vllm.errors import RefusedError

SERVED_METHODS = ("xquant", "xquant-cl")
METHODS = (
    "16bit",
    "kivi",
    "kivi-pre-rope",
    "paper-xquant",
    "paper-xquant-cl",
    "turboquant",
    *SERVED_METHODS,
)
DATASETS = ("wikitext-2", "c4", "gsm8k", "longbench")
DEFAULT_CALIBRATION, NO_CALIBRATION, DEFAULT_CALIBRATION_TOKENS = "python-docs", "none", 2048
FEWEST_CALIBRATION_TOKENS = 64

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
            ("--residual", self.residual or None, method == "kivi", "of kivi"),
            ("--basis", self.basis, served, "of xquant and xquant-cl"),
            ("--settings", self.settings, served, "of xquant and xquant-cl"),
            ("--calibration", self.calibration, served, "of xquant and xquant-cl"),
            ("--calibration-tokens", self.calibration_tokens, served, "of xquant and xquant-cl"),
        ):
            if value is not None and not useful:
                raise RefusedError(
                    f"xquant: {option} has no use with --method {method}: it is an option {where}; leave it out"
                )
        if self.group_size is not None and self.group_size < 1:
            raise RefusedError(f"xquant: --group-size {self.group_size} cannot work; set 1 or more, for example 128")
        if self.residual is not None and self.residual < 0:
            raise RefusedError(
                f"xquant: --residual {self.residual} cannot work; set 0 (none) or more; published is 128"
            )

    def baseline_bits(self, method: str) -> int:
        """The bits of a method that is not served, 4 if none are given.

        Raises:
            RefusedError: it has no such bits.
        """
        bits = self.bits or (_DEFAULT_BITS,)
        if len(bits) != 1 or bits[0] not in _BASELINE_BITS:
            raise RefusedError(
                f"xquant: --bits {' '.join(map(str, bits))} cannot work with --method {method}, which has one number "
                f"of bits for all; set one of {', '.join(map(str, _BASELINE_BITS))}"
            )
        return bits[0]

    def served_settings(self, method: str) -> dict[str, Any]:
        """The settings as a server would be given them.

        Raises:
            RefusedError: an option and ``--settings`` contradict each other, or the cache would not be read.
        """
        given: dict[str, Any] = {"method": method}
        if self.bits is not None:
            if len(self.bits) > 2:
                raise RefusedError(
                    f"xquant: --bits takes one number, or one for keys and one for values, not {list(self.bits)}"
                )
            given["bits"] = self.bits[0] if len(self.bits) == 1 else {"key": self.bits[0], "value": self.bits[1]}
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
                f"xquant: --settings has 'prompt': {given['prompt']!r}, so that a text which takes one step would tell "
                'nothing of the cache; set "cached" or leave it out'
            )
        return given
