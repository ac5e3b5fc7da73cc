"""First import of programs: sets passive waiting (`trio.openmp`) before torch loads."""

from trio.openmp import passively

passively()
