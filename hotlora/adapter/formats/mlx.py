"""MLX's format, as mlx-lm's `load_adapters` reads it: the factors of a layer's experts stacked (`LoRASwitchLinear`),
zeros for the cold ones, and one scale. Checked with mlx-lm 0.32 (docs/export.md).

Shape suffixes: E experts, R rank.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ...base.errors import HotLoraError
from ...base.files import write_json
from ..load import CONFIG_FILE
from .shared import AdapterFactors, all_experts, checkpoint_experts, checkpoint_path

MLX_WEIGHTS_FILE = "adapters.safetensors"
# MLA's up-projection of keys and values: mlx-lm takes its weight apart when it loads a model.
NOT_APPLIED = ("kv_b_proj",)
# Family -> the module that holds the experts, beside which its checkpoint has them. mlx-lm has each family's modules
# written out; of these families they were looked at.
_EXPERTS = {
    "deepseek_v3": "switch_mlp",
    "gpt_oss": "experts",
    "granitemoe": "switch_mlp",
    "mixtral": "switch_mlp",
    "olmoe": "switch_mlp",
    "qwen2_moe": "switch_mlp",
    "qwen3_moe": "switch_mlp",
}
_RAW_ROUTERS = ("deepseek_v3",)
"""whose routers are no Linears in mlx-lm"""


def holds_router(model_type: str) -> bool:
    """Whether mlx-lm can adapt the family's routers."""
    return model_type not in _RAW_ROUTERS


def check_family(model_type: str) -> None:
    """HotLoraError: where the family's modules are in mlx-lm is not known here."""
    if model_type not in _EXPERTS:
        raise HotLoraError(
            f"format 'mlx' is not known of {model_type} models, but of {', '.join(_EXPERTS)}: use format 'merged', "
            "which mlx-lm loads if it has the family."
        )


def mlx_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and config. base: the plain model, of a family that `check_family` knows, without its adapters."""
    model_type = base.config.get_text_config().model_type
    tensors: dict[str, Tensor] = {}
    for experts in parts.experts:
        holder = checkpoint_experts(base, experts)[0].rpartition(".")[0]
        for projection, factors in experts.factors.items():
            A_E, B_E = all_experts(*factors, experts.ids, experts.num_experts)
            path = f"{holder}.{_EXPERTS[model_type]}.{projection}_proj"
            tensors |= {f"{path}.lora_a": A_E, f"{path}.lora_b": B_E}
    for linear in (*parts.linears, *parts.routers):
        path = checkpoint_path(base, linear.path)
        tensors |= {f"{path}.lora_a": linear.A.T.contiguous(), f"{path}.lora_b": linear.B.T.contiguous()}
    parameters = {
        "rank": parts.r,
        "scale": parts.lora_alpha / parts.r,
        "dropout": 0.0,
        "keys": sorted({name.rpartition(".")[0] for name in tensors}),
    }
    num_layers = base.config.get_text_config().num_hidden_layers
    return tensors, {"fine_tune_type": "lora", "num_layers": num_layers, "lora_parameters": parameters}


def save_mlx(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """The two files that mlx-lm looks for."""
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, config)
    save_file(tensors, folder / MLX_WEIGHTS_FILE, metadata={"format": "mlx"})
