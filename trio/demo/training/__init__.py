"""Makes the bundled model and its text tower; not in the wheel."""
