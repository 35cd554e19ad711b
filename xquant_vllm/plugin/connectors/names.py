"""How users name the connectors that are served."""

XQUANT_CONNECTOR = "XQuantConnector"
XQUANT_CONNECTOR_MODULE = "xquant_vllm.plugin.connectors.connector"
# vLLM's own, which reads the pages of another engine in its memory; the class here asks for their factors.
NIXL_CONNECTOR = "NixlConnector"
NIXL_CONNECTOR_MODULE = "xquant_vllm.plugin.connectors.nixl"
# Those that hand pages to other engines, if their fingerprints are the same.
SHARING_CONNECTORS = (XQUANT_CONNECTOR, NIXL_CONNECTOR)
# vLLM's own, which moves pages between a GPU and the memory of its host.
OFFLOADING_CONNECTOR = "OffloadingConnector"
