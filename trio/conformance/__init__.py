"""Replay of recorded outputs of the methods' public reference implementations."""
