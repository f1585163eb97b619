"""The adapter: its config, the PEFT layers around `layer`, and saving, loading, merging, combining, counting."""

from . import model as model  # it makes PEFT's own ways take a HotLoraConfig
from . import packed_loading as packed_loading  # it makes `load_model` take checkpoints in MXFP4 and FP8
