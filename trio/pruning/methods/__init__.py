"""Pruning methods, one class in one file, which has the method's name."""
