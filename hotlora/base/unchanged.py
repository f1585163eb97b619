"""A model that is as it was where a change of it is refused."""

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Where the block raises, `model` has the modules, parameters, hooks, attributes and `requires_grad` that it had.

    Tensors' values are not kept: the block may add tensors, and must not write into those that were there.
    """
    modules = [(module, type(module), _attributes(module)) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in modules:
            module.__class__ = kind
            module.__dict__.clear()
            for name, (value, content) in attributes.items():
                module.__dict__[name] = value
                if content is not None:  # in place: others may hold the same dict, as PEFT's tuner and its model do
                    value.clear()
                    value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        raise


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """name -> (value, a copy of what it contains, where it is a container)"""
    return {
        name: (value, copy.copy(value) if type(value) in _CONTAINERS else None) for name, value in vars(module).items()
    }
