"""Pages that leave an engine and come back, to it or to another: KV connectors of vLLM."""
