"""How a latent vector becomes bytes in a page: quantizer, bit packing, page layout, rotations. Imports torch only."""
