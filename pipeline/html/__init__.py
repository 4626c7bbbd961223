"""Reports as single HTML files: no script, no network, nothing beside the file.

Figures are SVG, written by small functions; the templates arrange them.
"""
