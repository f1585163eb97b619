"""What servers make of an exported folder: written from their rules, on the CPU, and not from hotlora's exporter.

Each reader takes a plain base model and gives a copy of it with the adapter's updates in its weights. Where the
weights lie in the model's own layout is written down here by family.
"""

import copy
import json
import re
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from apart import apart
from peft import PeftModel
from safetensors.torch import load_file, save_file

# Experts' weights [E, in, out] in place of [E, out, in].
TRANSPOSED = ("gpt_oss", "aria_text", "aria")
# Gate and up in turn along the widened axis, in place of gate first.
INTERLEAVED = ("gpt_oss",)
# Where vLLM has the experts, as a suffix, and how it calls gate, down and up, where the model's own names differ.
# (vllm/model_executor/models/*.py: `get_expert_mapping`, and the module tree)
VLLM_NAMES = {
    "mixtral": (".block_sparse_moe.experts", ".mlp.experts", ("w1", "w2", "w3")),
    "minimax": (".block_sparse_moe.experts", ".mlp.experts", ("w1", "w2", "w3")),
    "gpt_oss": (".mlp.experts", ".mlp.experts", ("w1", "w2", "w3")),
    "phimoe": (".block_sparse_moe.experts", ".mlp.experts", ("w1", "w2", "w3")),
    # no gate: its first matrix is called up_proj
    "nemotron_h": (".mixer.experts", ".mixer.experts", ("up_proj", "down_proj", "")),
    "lfm2_moe": (".feed_forward.experts", ".feed_forward.experts", ("w1", "w2", "w3")),
}
USUAL_NAMES = (".experts", ".experts", ("gate_proj", "down_proj", "up_proj"))


def read_vllm(folder, base):
    """vLLM 2-D format: `from_lora_tensors`, then `pack_moe` over all experts of a layer."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert not config.get("modules_to_save") and not config["use_dora"] and config["bias"] == "none"
    scaling = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    modules = _modules(load_file(Path(folder) / "adapter_model.safetensors"))
    model, family = copy.deepcopy(base), base.config.model_type
    theirs, ours, (w1, w2, w3) = VLLM_NAMES.get(family, USUAL_NAMES)
    layers = sorted({name[: match.start()] for name in modules if (match := re.search(r"\.\d+\.\w+$", name))})
    for layer in layers:
        experts = model.get_submodule(_from_vllm(layer, family).removesuffix(theirs) + ours)
        for expert in range(len(experts.down_proj)):
            packed = [modules.pop(f"{layer}.{expert}.{w}") for w in (w1, w2, w3) if w]  # pack_moe's assertions
            deltas = [(B.double() @ A.double()) * scaling for A, B in packed]
            _add_to_expert(experts, expert, family, *deltas)
    for name, (A, B) in modules.items():
        if name.endswith(".kv_b_proj"):  # loaded, and applied nowhere (vllm#48974)
            continue
        _add_to_linear(model, _from_vllm(name, family), B.double() @ A.double() * scaling)
    return model


def read_sglang(folder, base):
    """SGLang: the slot is zeroed, then the experts that are there are copied; found by layer, expert and name."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    modules = _modules(load_file(Path(folder) / "adapter_model.safetensors"))
    model, family = copy.deepcopy(base), base.config.model_type
    for layer, experts in _experts_by_layer(model).items():
        F, D = _expert_shape(experts, family)
        for expert in range(len(experts.down_proj)):
            names = [n for n in modules if re.search(rf"layers\.{layer}\..*experts\.{expert}\.\w+$", n)]
            pairs = {name.rpartition(".")[2]: [m.double() for m in modules.pop(name)] for name in names}
            slot = {"gate_proj": torch.zeros(F, D), "up_proj": torch.zeros(F, D), "down_proj": torch.zeros(D, F)}
            slot |= {name: B @ A * scaling for name, (A, B) in pairs.items()}
            if family in INTERLEAVED and pairs:
                slot["gate_proj"], slot["up_proj"] = _sglang_in_turn(*pairs["gate_proj"], *pairs["up_proj"], scaling)
            if hasattr(experts, "gate_up_proj"):
                _add_to_expert(experts, expert, family, slot["gate_proj"], slot["down_proj"], slot["up_proj"])
            else:
                # without a gate, the first matrix has the gate's name (`normalize_gate_up_proj`)
                _add_to_expert(experts, expert, family, slot["gate_proj"], slot["down_proj"])
    for name, (A, B) in modules.items():
        _add_to_linear(model, _from_vllm(name, family), B.double() @ A.double() * scaling)
    return model


def read_sglang_shared(folder, base):
    """SGLang's shared-outer form: A of gate and up, and B of down, are `[1, …]` and every expert's
    (`_detect_shared_outer_loras`); the others numbered, of the experts that are there. Read as if each had its own."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    shared = {name: tensors.pop(name) for name in [*tensors] if tensors[name].ndim == 3}
    assert shared and all(len(tensor) == 1 for tensor in shared.values())
    own = {}
    for name, tensor in shared.items():
        root, _, rest = name.rpartition(".experts.")  # gate_proj.lora_A.weight
        assert rest in ("gate_proj.lora_A.weight", "up_proj.lora_A.weight", "down_proj.lora_B.weight")
        other = rest.replace("lora_A", "lora_?").replace("lora_B", "lora_A").replace("lora_?", "lora_B")
        ids = [int(m[1]) for n in tensors if (m := re.fullmatch(rf"{re.escape(root)}\.experts\.(\d+)\.{other}", n))]
        own |= {f"{root}.experts.{expert}.{rest}": tensor[0].clone() for expert in ids}
    with tempfile.TemporaryDirectory() as expanded:
        write_adapter(Path(expanded) / "as-read", config, {**tensors, **own})
        return read_sglang(Path(expanded) / "as-read", base)


def _sglang_in_turn(A_gate, B_gate, A_up, B_up, scaling):
    """gpt_oss in 0.5.23: the rows of B in turn (`FusedMoEWithLoRA._slice_moe_b_2d`), of which the first half is then
    multiplied by gate's A and the second by up's (`_add_lora_gate_up_delta`)."""
    B = torch.stack([B_gate, B_up], 1).flatten(0, 1) * scaling
    delta = torch.cat([B[: len(B_gate)] @ A_gate, B[len(B_gate) :] @ A_up])
    return delta[::2], delta[1::2]


# Where mlx-lm has a layer's experts (mlx_lm/models/*.py), and llama.cpp's names of the parts of a layer
# (src/llama-arch.cpp), by the model's own.
MLX_EXPERTS = {"gpt_oss": "mlp.experts", "mixtral": "block_sparse_moe.switch_mlp"}
MLX_EXPERTS["granitemoe"] = MLX_EXPERTS["mixtral"]
LLAMA_CPP = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.gate", "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj", "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip


def read_mlx(folder, base):
    """mlx-lm: `linear_to_lora_layers`, then what `fuse` of LoRALinear and LoRASwitchLinear would add."""
    config = json.loads((Path(folder) / "adapter_config.json").read_text())["lora_parameters"]
    tensors = load_file(Path(folder) / "adapters.safetensors")
    model, family = copy.deepcopy(base), base.config.model_type
    layers = _experts_by_layer(model)
    assert {key.rpartition(".")[0] for key in tensors} == set(config["keys"])
    pairs = {key: (tensors[f"{key}.lora_a"].double(), tensors[f"{key}.lora_b"].double()) for key in config["keys"]}
    for index, experts in layers.items():
        at = f"model.layers.{index}.{MLX_EXPERTS.get(family, 'mlp.switch_mlp')}."
        if at + "gate_proj" in pairs:
            deltas = {}
            for name in ("gate_proj", "up_proj", "down_proj"):
                A, B = pairs.pop(at + name)  # [E, R, in], [E, out, R]
                assert A.shape[:2] == (len(experts.down_proj), config["rank"])
                deltas[name] = config["scale"] * (B @ A)
            for expert in range(len(experts.down_proj)):
                _add_to_expert(experts, expert, family, *(deltas[name][expert] for name in (
                    "gate_proj", "down_proj", "up_proj")))  # fmt: skip
    for name, (A, B) in pairs.items():  # [in, R], [R, out]
        _add_to_weight(model, name, config["scale"] * (B.T @ A.T))
    return model


def read_gguf(folder, base):
    """llama.cpp: `build_lora_mm` and `build_lora_mm_id`, on weights as its conversion lays them out."""
    import gguf

    reader = gguf.GGUFReader(Path(folder) / "adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}
    model, family, config = copy.deepcopy(base), base.config.model_type, base.config
    deltas = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        deltas[name.removesuffix(".weight")] = alpha / B.shape[-1] * (B @ A)
    for index, experts in _experts_by_layer(model).items():
        for expert in range(len(experts.down_proj)):
            names = [f"blk.{index}.ffn_{name}_exps" for name in ("gate", "down", "up")]
            if names[0] in deltas:
                _add_to_expert(experts, expert, family, *(deltas[name][expert] for name in names))
    for name, delta in deltas.items():
        _, index, part = name.split(".")
        if part.endswith("_exps"):
            continue
        if family in ("mixtral", "granitemoe") and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            delta = delta.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        path = f"model.layers.{index}.{LLAMA_CPP[part]}"
        if family == "deepseek_v3":
            path = path.replace("shared_expert.", "shared_experts.")
        _add_to_weight(model, path, delta)
    return model


def plain_peft_logits(folders, tmp_path):
    """name -> logits of `(family, folder)`, loaded by plain PEFT in a process of its own that never saw hotlora;
    and what it said of those that it could not load."""
    output = tmp_path / "logits.safetensors"
    said = apart(_plain_peft_logits, [(name, *case) for name, case in folders.items()], output)
    return load_file(output), said


def _plain_peft_logits(cases, output):
    import zoo

    zoo.families = cache(zoo.families)
    found, said = {}, []
    for name, family, folder in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                warnings.filterwarnings("error", message="Found missing adapter keys")
                warnings.filterwarnings("error", message=".*unexpected keys.*")
                model = PeftModel.from_pretrained(zoo.zoo_model(family), folder)
            found[name] = logits(model)
        except Exception as error:
            said.append(f"{name}: {type(error).__name__}: {error}"[:600])
    assert not any(module.split(".")[0] == "hotlora" for module in sys.modules)
    save_file(found, output)
    return "\n".join(said)


def logits(model):
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids).logits.float().contiguous()


def save_plain_peft(model, folder):
    """Saves a plain PEFT adapter as PEFT does."""
    model.save_pretrained(folder, save_embedding_layers=False)


def _modules(tensors):
    """Module name, without PEFT's prefix -> (A, B)."""
    found = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        assert match and tensor.ndim == 2, name
        found.setdefault(match[1], {})[match[2]] = tensor
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _from_vllm(name, family):
    """The module in transformers' tree: vLLM's names are the checkpoints'."""
    if family == "nemotron_h":
        name = re.sub(r"^backbone\.", "model.", name)
    if family in ("aria",):
        name = re.sub(r"^language_model\.model\.", "model.language_model.", name)
    return name


def _experts_by_layer(model):
    paths = {path: m for path, m in model.named_modules() if path.endswith(".experts") and hasattr(m, "down_proj")}
    return {int(re.search(r"layers\.(\d+)\.", path)[1]): module for path, module in paths.items()}


def _expert_shape(experts, family):
    _, a, b = experts.down_proj.shape
    return (a, b) if family in TRANSPOSED else (b, a)


def _add_to_expert(experts, expert, family, first, down, up=None):
    """first: the gate's update [F, D], or up's where there is no gate. down [D, F], up [F, D]."""
    F = len(first)
    for row in range(F):
        for weight, delta, at in [
            (getattr(experts, "gate_up_proj", None), first, 2 * row if family in INTERLEAVED else row),
            (getattr(experts, "gate_up_proj", None), up, 2 * row + 1 if family in INTERLEAVED else F + row),
            (getattr(experts, "up_proj", None), first, row),
        ]:
            if weight is not None and delta is not None:
                target = weight.data[expert][:, at] if family in TRANSPOSED else weight.data[expert][at]
                target += delta[row]
    experts.down_proj.data[expert] += down.T if family in TRANSPOSED else down


def _add_to_linear(model, name, delta):
    module = model.get_submodule(name)
    assert isinstance(module, torch.nn.Linear), name
    module.weight.data += delta.to(module.weight.dtype)


def _add_to_weight(model, name, delta):
    """To a Linear, or to the router of the layer, whatever that is called."""
    router = re.fullmatch(r"(model\.layers\.\d+)\.(mlp|block_sparse_moe)\.(gate|router|router\.layer)", name)
    if router:
        layer = model.get_submodule(router[1])
        routers = re.compile(r"\w+\.(gate|router)(\.\w+)?\.weight")
        (weight,) = (parameter for name, parameter in layer.named_parameters() if routers.fullmatch(name))
        weight.data += delta.to(weight.dtype)
    else:
        _add_to_linear(model, name, delta)


def write_adapter(folder, config, tensors):
    """A PEFT adapter's folder, from its two files' content."""
    Path(folder).mkdir(parents=True)
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
