"""The members of vLLM's enum of attention backends that this package adds.

Named here by dotted path: vLLM wants paths, and what is not selected need not be imported.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND_NAME = "XQUANT"
KIVI_BACKEND_NAME = "KIVI"


class Backend(NamedTuple):
    """Where a backend is found.

    Attributes:
        path: of its class.
        check: of the function that refuses configurations, called with vLLM's.
        hook: of the function that has loaded weights handed over, called without arguments.
        settings: of the pydantic model of its settings, whose key in ``additional_config`` is the backend's name in
            small letters.
    """

    path: str
    check: str
    hook: str
    settings: str


BACKENDS = {
    BACKEND_NAME: Backend(
        "xquant_vllm.plugin.backend.backend.XQuantBackend",
        "xquant_vllm.plugin.checks.check_config",
        "xquant_vllm.plugin.load.loader.install_loader_hook",
        "xquant_vllm.scheme.settings.XQuantSettings",
    ),
    KIVI_BACKEND_NAME: Backend(
        "xquant_vllm.kivi.plugin.backend.KiviBackend",
        "xquant_vllm.kivi.plugin.checks.check_config",
        "xquant_vllm.kivi.plugin.loader.install_loader_hook",
        "xquant_vllm.kivi.plugin.settings.KiviSettings",
    ),
}


def get_member(name: str = BACKEND_NAME) -> "AttentionBackendEnum":
    """The enum member of a backend, registered on first use in a process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[name]
    member = AttentionBackendEnum.register(name, BACKENDS[name].path)
    # An enum member pickles by value. A spawned process unpickles its config before it loads any plugin and would not
    # know the value; pickled as a call of this function, the member registers itself there.
    member.__reduce_ex__ = lambda protocol: (get_member, (name,))  # type: ignore[method-assign, assignment, misc]
    return member


def selected_backends(attention_config: object) -> list[str]:
    """Those of this package's backends that a vLLM ``AttentionConfig`` asks for, for all or for a kind of layers."""
    chosen = [getattr(attention_config, "backend", None)]
    chosen += list((getattr(attention_config, "backend_per_kind", None) or {}).values())
    names = {getattr(backend, "name", None) for backend in chosen}
    return [name for name in BACKENDS if name in names]
