"""Decoder layers of LLaMA's type in few operations."""
