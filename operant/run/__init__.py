"""A run on disk: checkpoints, log, report, exact resume."""
