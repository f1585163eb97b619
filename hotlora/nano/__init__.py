"""The embedded default: a small, really trained MoE and its three tasks, generated from a seed."""
