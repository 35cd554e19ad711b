"""What kernels must cost, counted: bytes, operations and cycles. Predictions, nothing measured."""
