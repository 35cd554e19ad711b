"""How users name the connectors that are served."""

XQUANT_CONNECTOR = "XQuantConnector"
XQUANT_CONNECTOR_MODULE = "xquant_vllm.plugin.connectors.connector"
# vLLM's own, which moves pages between a GPU and the memory of its host.
OFFLOADING_CONNECTOR = "OffloadingConnector"
