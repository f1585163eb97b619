"""Routing profiles, the hooks that make them, rules, and expert plans."""
