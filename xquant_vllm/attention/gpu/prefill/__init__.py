"""Attention of many query tokens: keys and values pass through a workspace of bounded size."""
