"""Reductions of visual tokens in the vision encoder."""
