"""A run's folder; one training; evaluations, exports, stages and sweeps."""
