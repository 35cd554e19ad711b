"""Hot blocks: keys and values of blocks that are attended often, rematerialized once and kept beside the pages."""
