"""Pages that are shared between engines: how many bytes, and how long a request waits for them."""
