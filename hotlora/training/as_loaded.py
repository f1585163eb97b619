"""A model's configs as they were loaded, around a trainer that sets them for itself.

transformers' and TRL's trainers switch `use_cache` off, set `router_aux_loss_coef`, and take special tokens from the
tokenizer, in the model's config and its generation_config. None of that belongs into what is saved; and transformers
refuses to save a generation_config that was changed and has, as published ones do, `temperature` beside
`do_sample: false`.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel

_Values = list[tuple[Any, dict[str, Any]]]


class LoadedConfigs:
    """The configs of `model`, or of the model that a PEFT model wraps, as they are now. A trainer may then set them."""

    def __init__(self, model: Any) -> None:
        self._base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self._loaded = self._values()
        self._generation = getattr(self._base, "generation_config", None)
        if self._generation is not None:
            self._base.generation_config = copy.deepcopy(self._generation)

    def restore(self) -> None:
        """Puts them back."""
        self._set(self._loaded, self._generation)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts them back for as long as this takes."""
        now, generation = self._values(), getattr(self._base, "generation_config", None)
        self.restore()
        try:
            yield
        finally:
            self._set(now, generation)

    def _values(self) -> _Values:
        config = self._base.config
        text = config.get_text_config()
        return [(part, dict(part.__dict__)) for part in ([config] if text is config else [config, text])]

    def _set(self, values: _Values, generation: Any) -> None:
        for config, held in values:  # in place: modules hold these very objects
            config.__dict__.clear()
            config.__dict__.update(held)
        if generation is not None:
            self._base.generation_config = generation
