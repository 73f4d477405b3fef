"""Convolution and pooling in plain JAX, in the form that each platform runs fast."""
