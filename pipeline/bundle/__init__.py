"""The bundle: a result folder that a receiver can use and check without us."""
