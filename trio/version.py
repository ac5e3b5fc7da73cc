"""The version of this package: also for a job that was submitted, where nothing is installed."""

from importlib import metadata

VERSION = "0.13.0"


def of_library(name: str) -> str:
    """ "unknown" where it came without its metadata."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"
