"""Measurements that `jobs/benchmark.py` runs."""
