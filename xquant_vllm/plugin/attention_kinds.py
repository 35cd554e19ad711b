"""Which of vLLM's attention layers are served: its ``Attention`` itself, and of everything built on it nothing.

A class built on ``Attention``, or a metadata builder wrapped around a backend's, may hand sequences over with other
lengths, other positions or another mask than the tokens have. Keys are rematerialized with the positions that a batch
tells, so each would be served wrong, and silently. What is known to vLLM is named here in its user's words; what is not
is refused by the name of its class. A test goes through the installed vLLM and fails for one that is missing here.
"""

# By class: what is special about a layer.
REFUSED_LAYERS = {
    "ChunkedLocalAttention": "attention within chunks of the sequence (attention_chunk_size)",
    "StaticSinkAttention": "learned sink tokens, keys that no token has",
    "RSWAAttention": "reference sliding windows, which keep the prompt beside the window (rswa_window)",
    "PrefillPrefixLMAttention": "prefix language modelling, prompts that see their own future",
    "EncoderOnlyAttention": "encoder layers, tokens that see their own future",
    "CrossAttention": "cross attention between an encoder and a decoder",
    "WhisperCausalAttentionWithBlockPooling": "pooled blocks, several positions for a token",
}
# By the first letters of the names that vLLM gives to wrapped backends, as far as they are not those of a layer.
REFUSED_WRAPPERS = {
    "StaticSink_": REFUSED_LAYERS["StaticSinkAttention"],
    "FastPrefill": "layers that share keys and values (--kv-sharing-fast-prefill)",
}


def layer_problem(layer: type) -> str:
    """What is special about a class of attention layers other than ``Attention`` itself."""
    unknown = f"layers of the class {layer.__name__}, built on vLLM's Attention in a way not known here"
    return REFUSED_LAYERS.get(layer.__name__, unknown)


def wrapper_problem(name: str) -> str:
    """What is special about a backend, or a metadata builder, that was derived from one of this package.

    Args:
        name: of the derived class.
    """
    known = {f"{layer}_": problem for layer, problem in REFUSED_LAYERS.items()} | REFUSED_WRAPPERS
    for start, problem in known.items():
        if name.startswith(start):
            return problem
    return f"layers that change this backend by {name}, in a way not known here"
