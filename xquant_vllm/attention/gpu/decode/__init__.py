"""Attention of few query tokens per sequence: keys are rematerialized as they go."""
