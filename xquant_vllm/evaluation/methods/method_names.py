"""Names that options take. Imports nothing: --help shows them before torch is there."""

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
DEFAULT_CALIBRATION, NO_CALIBRATION = "python-docs", "none"
