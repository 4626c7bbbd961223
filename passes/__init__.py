"""Layer 2, graphs: graph to graph and graph to plan.

Knows ``runtime_ops``; knows no calibration data.
"""
