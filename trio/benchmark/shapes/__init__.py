"""Random models of published sizes."""
