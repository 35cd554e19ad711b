"""What a machine, a folder of factors and the factor cache say of themselves: ``xquant doctor`` and ``inspect``."""
