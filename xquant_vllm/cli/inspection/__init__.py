"""Commands that look and tell: ``xquant doctor``, ``xquant inspect`` and ``xquant cache``."""
