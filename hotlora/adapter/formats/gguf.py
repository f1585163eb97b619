"""llama.cpp's format: LoRA in one GGUF file, by the package `gguf`, whose tables name the tensors.

llama.cpp has a layer's experts in one tensor for each projection, and their factors likewise, zeros for the cold ones.
It reads one alpha, and each pair's rank from its shape. Checked with gguf 0.19 and llama.cpp as of llama-cpp-python 0.3
(docs/export.md).

Shape suffixes: E experts, R rank.
"""

import importlib.util
from pathlib import Path
from typing import Any

from torch import Tensor

from ...base.errors import FileError, HotLoraError
from .shared import AdapterFactors, all_experts, checkpoint_path

GGUF_FILE = "adapter.gguf"
# Family -> gguf's name of its architecture. Of these families llama.cpp's conversion was looked at: what it does to
# weights must be done to factors.
_ARCHITECTURES = {
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_ROTATED_IN_PAIRS = ("granitemoe", "mixtral")
"""whose rows of q and k are put in another order, for another form of rotary embeddings"""


def not_applied(paths: list[str]) -> list[str]:
    """MLA's projections but the last: llama.cpp reads their updates, and multiplies without them."""
    with_mla = {path.rpartition(".")[0] for path in paths if path.endswith("kv_b_proj")}
    return [path for path in paths if path.rpartition(".")[0] in with_mla and not path.endswith("o_proj")]


def check_installed() -> None:
    """HotLoraError: the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise HotLoraError(f"format 'gguf' needs the package gguf ({error}): pip install hotlora[gguf].") from error


def check_file(file: Path) -> None:
    """FileError: a file that is cut short, or no GGUF."""
    try:
        with open(file, "rb") as opened:
            is_gguf = opened.read(4) == b"GGUF"
        if is_gguf and importlib.util.find_spec("gguf"):  # without it, as on another machine, the engine will see
            import gguf

            gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise FileError(f"{file} is cut short or no GGUF file ({error}): export again.") from error
    if not is_gguf:
        raise FileError(f"{file} is no GGUF file: export again.")


def check_family(model_type: str) -> None:
    """HotLoraError: how llama.cpp converts the family is not known here."""
    if model_type not in _ARCHITECTURES:
        raise HotLoraError(
            f"format 'gguf' is not known of {model_type} models, but of {', '.join(_ARCHITECTURES)}: use format "
            "'merged', which llama.cpp converts if it has the family."
        )


def gguf_format(base: Any, parts: AdapterFactors) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by gguf's names, and the architecture and alpha.

    base: the plain model, whose adapters are out of the way.

    HotLoraError: a module that llama.cpp does not have in the family, which `check_family` knows.
    """
    import gguf

    config = base.config.get_text_config()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == _ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    kinds = {
        "gate": gguf.MODEL_TENSOR.FFN_GATE_EXP,
        "up": gguf.MODEL_TENSOR.FFN_UP_EXP,
        "down": gguf.MODEL_TENSOR.FFN_DOWN_EXP,
    }
    tensors: dict[str, Tensor] = {}
    for experts in parts.experts:
        layer = experts.path.partition(".layers.")[2].partition(".")[0]
        for projection, factors in experts.factors.items():
            name = gguf.TENSOR_NAMES[kinds[projection]].format(bid=layer) + ".weight"
            A_E, B_E = all_experts(*factors, experts.ids, experts.num_experts)
            tensors |= {f"{name}.lora_a": A_E, f"{name}.lora_b": B_E}
    for linear in (*parts.linears, *parts.routers):
        path = checkpoint_path(base, linear.path)
        found: str | None = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if found is None:
            raise HotLoraError(
                f"format 'gguf': llama.cpp has no {path} in a {config.model_type} model. Use format 'merged'."
            )
        B = _as_converted(linear.B, path, config)
        tensors |= {f"{found}.lora_a": linear.A.contiguous(), f"{found}.lora_b": B.contiguous()}
    return tensors, {"arch": _ARCHITECTURES[config.model_type], "lora_alpha": parts.lora_alpha}


def _as_converted(B: Tensor, path: str, config: Any) -> Tensor:
    """B `[out, R]` with its rows where llama.cpp's conversion puts those of the weight."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rpartition(".")[2])
    if config.model_type not in _ROTATED_IN_PAIRS or heads is None:
        return B
    return B.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def save_gguf(config: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> None:
    """One file, as llama.cpp's `--lora` takes it."""
    import gguf

    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / GGUF_FILE, config["arch"])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
