"""The error of the tools."""


class RefusedError(ValueError):
    """Something the user can mend: one line with what, why and what to do instead."""
