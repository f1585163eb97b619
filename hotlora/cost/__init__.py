"""FLOPs, memory and time, before a run."""
