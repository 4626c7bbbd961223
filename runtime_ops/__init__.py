"""Layer 1, meaning: what every quantized format and operator computes.

Knows no graphs, no data and no files.
"""
