"""Inputs with the integers that a receiver must get for them, and the comparison with what it got."""
