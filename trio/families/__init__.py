"""Model families: one file each, behind one interface."""
