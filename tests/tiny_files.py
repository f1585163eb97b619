"""A tiny model's folder, and a file of rows, as several tests take them."""

import json
from pathlib import Path

from tiny import tiny_model
from tiny_tokenizer import byte_tokenizer


def save_tiny_model(folder: Path) -> str:
    """An OLMoE whose vocabulary is the byte tokenizer's, which lies beside it."""
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=512).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def write_sums(file: Path) -> str:
    """24 rows of a prompt and its completion."""
    rows = ({"prompt": f"{i} and {i % 7}", "completion": f" make {i + i % 7}"} for i in range(24))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)
