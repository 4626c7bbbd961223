"""Layer 4, order: stages, configuration, files, targets, reports and the command line.

Knows every layer, and computes nothing itself.
"""
