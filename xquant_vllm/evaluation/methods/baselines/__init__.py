"""Other ways to quantize a cache, as published, to compare with. One file each, with its source."""
