"""Follow tensors through an attention module: which rows of which linear layers become its keys and values."""
