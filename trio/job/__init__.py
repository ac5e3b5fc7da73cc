"""An inference job: its settings, from flags and run.yaml."""
