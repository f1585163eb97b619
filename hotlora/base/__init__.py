"""Errors, files, locks, processes, signals: nothing of the field."""
