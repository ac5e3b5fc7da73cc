"""How fast, and of what is possible how much."""
