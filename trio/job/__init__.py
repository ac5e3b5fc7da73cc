"""The job around the engine: Ray Data over a run's units, and what it reads and writes."""

import os

# Read when Ray is imported. That a process died, the job says itself.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
