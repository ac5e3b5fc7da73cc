"""For programs, as their first import: threads then wait as `waiting` describes."""

from trio.openmp import passively

passively()
