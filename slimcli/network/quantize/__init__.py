"""Symmetric int8 fake quantization of a network: where quantizers go and what they compute."""
