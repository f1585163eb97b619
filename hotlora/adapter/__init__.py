"""The adapter: its config, the PEFT layers around `layer`, and saving, loading, merging, combining, counting."""

from . import model as model  # it makes PEFT's own ways take a HotLoraConfig
