"""SGLang's format: a pair of matrices for each hot expert and projection."""

from typing import Any

from torch import Tensor

from .shared import AdapterFactors, ExpertFactors, checkpoint_experts, expert_names, server_format


def sglang_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config. base: the plain model, whose adapters are out of the way."""
    return server_format(base, parts, _names, has_cold=False)


def _names(base: Any, experts: ExpertFactors) -> tuple[str, dict[str, str]]:
    """SGLang goes by the layer's index, the expert's, and gate, up and down."""
    return checkpoint_experts(base, experts)[0], expert_names(experts)
