"""Do nano's hot experts depend on the precision in which it is profiled? Writes results/nano/precision.json.

python scripts/precision.py        # some minutes on a CPU; python scripts/study.py then writes docs/study.md
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from hotlora.adapter.quantize import quantize_experts
from hotlora.base.files import write_json
from hotlora.hf.models import load_model, load_tokenizer
from hotlora.hf.moe_layers import moe_layers
from hotlora.routing.drift import drift
from hotlora.routing.profiler import profile_examples
from hotlora.tasks.data import load_examples
from hotlora.tasks.tokens import batches, tokenize

RESULT = Path(__file__).resolve().parent.parent / "results" / "nano" / "precision.json"
TASKS = ("nano-math", "nano-sql", "nano-choice")
EXAMPLES, KEPT = 1000, 8
BLOCK, LARGEST = 128, torch.finfo(torch.float8_e4m3fn).max


def float32() -> nn.Module:
    return load_model("nano", dtype="float32", device="cpu")


def bfloat16() -> nn.Module:
    return load_model("nano", dtype="bfloat16", device="cpu")


def fp8() -> nn.Module:
    """Experts as a checkpoint in fp8 has them, made dense again."""
    model = float32()
    for layer in moe_layers(model):
        for weight in model.get_submodule(layer.experts).parameters():
            weight.data = as_fp8(weight.data)
    return model


def eight_bits() -> nn.Module:
    return quantize_experts(float32(), 8)


def four_bits() -> nn.Module:
    return quantize_experts(float32(), 4)


def four_bits_all() -> nn.Module:
    """As QLoRA: every Linear but the head too."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return quantize_experts(load_model("nano", dtype="float32", device="cpu", quantization_config=config), 4)


MODELS = {
    "bf16": bfloat16, "fp8 experts": fp8, "int8 experts": eight_bits, "nf4 experts": four_bits,
    "nf4 experts and Linears": four_bits_all,
}  # fmt: skip


def as_fp8(weight: Tensor) -> Tensor:
    """[E, rows, columns] rounded to e4m3 with a scale for each block of 128 x 128, as DeepSeek's checkpoints are."""
    rounded = torch.empty_like(weight)
    for rows in range(0, weight.shape[1], BLOCK):
        for columns in range(0, weight.shape[2], BLOCK):
            part = (slice(None), slice(rows, rows + BLOCK), slice(columns, columns + BLOCK))
            scale = weight[part].abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-12) / LARGEST
            rounded[part] = (weight[part] / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale
    return rounded


def counts_of(model: nn.Module) -> dict[str, Tensor]:
    """Task -> int32 [X, L, E]."""
    tokenizer = load_tokenizer("nano")
    found = {}
    for task in TASKS:
        rows = tokenize(load_examples(task, "train", limit=EXAMPLES, seed=0, tokenizer=tokenizer), tokenizer, 512)
        found[task] = profile_examples(model, batches(rows, tokenizer, 32))[1]
    return found


def main() -> None:
    reference = counts_of(float32())
    tokens = {task: int(counts[:, 0].sum()) // 4 for task, counts in reference.items()}
    result = {"model": "nano", "reference": "float32", "tokens": tokens, "precisions": {}}
    for name, load in MODELS.items():
        found = counts_of(load())
        result["precisions"][name] = {task: drift(reference[task], found[task], KEPT) for task in TASKS}
        print(name, {task: round(row["jaccard"], 3) for task, row in result["precisions"][name].items()}, flush=True)
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
