"""The linear layers of an attention module under surgery: what is read off them, and what takes their place."""
