"""Layer 3, data: sources, streaming statistics, and the search for scales.

Knows ``passes`` and ``runtime_ops``; knows no files, targets or people.
"""
