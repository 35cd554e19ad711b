"""Bytes and spans of time in words."""

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_SPANS = (("day", 86400), ("hour", 3600), ("minute", 60))


def amount(size: float) -> str:
    """``"1.5 MiB"`` and so on."""
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"


def ago(seconds: float) -> str:
    """``"3 days ago"`` and so on."""
    for name, span in _SPANS:
        count = int(seconds // span)
        if count > 0:
            return f"{count} {name}{'' if count == 1 else 's'} ago"
    return "just now"
