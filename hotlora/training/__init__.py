"""TRL's trainer, wired: options, methods, checkpoints, re-profiling."""
