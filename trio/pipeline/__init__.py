"""The captioning job: Parquet shards in, answers with statistics out, in Ray actors.

A run is planned once (``manifest``), cut into work units of consecutive rows (``plan``), and every
unit becomes one file of rows and one of statistics whose names follow from the plan alone. Doing a
unit twice therefore gives the same file again, never a second copy of its rows.
"""
