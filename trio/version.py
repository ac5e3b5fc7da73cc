"""The version of this package: also for a job that was submitted, where nothing is installed."""

VERSION = "0.9.0"
