"""What scripts of your own need to turn rows into batches."""

from .tasks.data import load_examples
from .tasks.tokens import batches, tokenize

__all__ = ["batches", "load_examples", "tokenize"]
