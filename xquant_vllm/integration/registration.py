"""The member ``XQUANT`` of vLLM's enum of attention backends."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "XQUANT"
_BACKEND_PATH = "xquant_vllm.integration.backend.XQuantBackend"


def get_member() -> "AttentionBackendEnum":
    """The enum member, registered on first use in a process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if BACKEND_NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[BACKEND_NAME]
    member = AttentionBackendEnum.register(BACKEND_NAME, _BACKEND_PATH)
    # An enum member pickles by value. A spawned process unpickles its config before it loads any plugin and would not
    # know the value; pickled as a call of this function, the member registers itself there.
    member.__reduce_ex__ = lambda protocol: (get_member, ())  # type: ignore[method-assign, assignment, misc]
    return member


def selects_xquant(attention_config: object) -> bool:
    """Whether a vLLM ``AttentionConfig`` asks for this backend, for all layers or for a kind of layers."""
    chosen = [getattr(attention_config, "backend", None)]
    chosen += list((getattr(attention_config, "backend_per_kind", None) or {}).values())
    return any(getattr(backend, "name", None) == BACKEND_NAME for backend in chosen)
