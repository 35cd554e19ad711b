"""What kernels read of a format, as tables on the device: bit addresses, latents, streams, predictions, rotations."""
