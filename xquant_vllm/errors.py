"""The errors that a user can fix. Each message is whole: what is wrong, why, and what to do instead."""


class XQuantError(ValueError):
    """The base of all of them; the command line prints it and stops."""


class SettingsError(XQuantError):
    """A setting of the server that cannot work; the message names it, its value, why, and what to set."""


class UnsupportedError(XQuantError):
    """A model, or a feature of vLLM, that does not work together with a backend of this package."""


class RefusedError(XQuantError):
    """A file, a text or an option of a command that cannot be used."""


class FactorFileError(XQuantError):
    """A factor file that cannot be used; the message says what is wrong with it, a verb first, without its name."""


class EngineError(XQuantError):
    """The vLLM engine of an evaluation failed; the message names the cause and the file with all of it."""


def counted(number: int, noun: str) -> str:
    """``"1 window"``, ``"2 windows"``: a number and a noun whose plural ends with an s."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def cause_of(error: BaseException) -> str:
    """What another library's error says, in one line: its first that is not empty, or else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A KeyError says nothing but the key.
    named = isinstance(error, KeyError) or not lines
    return ": ".join(([type(error).__name__] if named else []) + lines[:1])
