"""Throughput and latency, and the share of the hardware's limit."""
