"""Calibration at an engine's first start, before a weight is loaded."""
