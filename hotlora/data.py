"""What scripts of your own need to turn rows into batches."""

from .tasks.data import batches, load_examples, tokenize

__all__ = ["batches", "load_examples", "tokenize"]
