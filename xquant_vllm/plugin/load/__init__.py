"""What happens once, when a model is loaded: recognize its layers, exchange weights, prove the result."""
