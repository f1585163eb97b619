"""Routing that others measured: their files, one module a form."""
