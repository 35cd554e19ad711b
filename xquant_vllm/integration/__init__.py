"""Everything that knows vLLM: plugin, settings, backend, cache spec, module surgery. No other room imports vLLM."""
