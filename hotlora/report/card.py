"""The model card of a saved adapter or model: its README.md, made from the run's record. Loads no model."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from ..base.errors import DataError
from ..base.escape import markdown, one_line
from ..base.files import atomic_path, read_json, write_text
from ..base.records import Record, read_record
from ..hf.hub import can_be_on_hub, public_name
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from ..tasks import without_parts
from .figures import heat_map
from .text import human_bytes, loss_word

if TYPE_CHECKING:
    from ..adapter.formats.room import Room

PICTURE = "experts.png"
_ADAPTER = (
    "rule", "fraction", "experts_per_layer", "r", "lora_alpha", "lora_dropout", "train_attention", "train_router",
)  # fmt: skip
_SERVERS = {"vllm": "vLLM", "sglang": "SGLang", "sglang-shared": "SGLang", "gguf": "llama.cpp", "mlx": "mlx-lm"}
_MADE = {
    "vllm": "adapter for vLLM", "sglang": "adapter for SGLang", "peft": "adapter for PEFT", "merged": "merged",
    "combined": "combined adapter", "gguf": "adapter for llama.cpp", "mlx": "adapter for MLX",
    "sglang-shared": "adapter for SGLang",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What a reader of the card would look for; the record has all options.
_SHOWN = (
    "rule", "fraction", "experts_per_layer", "r", "lora_alpha", "lora_dropout", "train_attention", "train_router",
    "epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler", "max_length",
    "packing", "seed", "dtype", "quantize",
)  # fmt: skip


def write_card(run: str | os.PathLike[str]) -> Path:
    """Writes README.md, and a picture of the plan, beside what the run in this folder trained; returns its path.

    DataError: the run has not come to its end. FileError: it has no record.
    """
    folder = Path(run)
    record = read_record(folder)
    trained = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
    if record["status"] != "done" or not trained:
        raise DataError(f"{folder} has nothing trained to describe: its status is {record['status']!r}.")
    profile, plan = folder / str(record.get("profile", {}).get("path", "")), folder / "plan.json"
    if has_picture := profile.is_file() and plan.is_file():
        with atomic_path(trained[0] / PICTURE) as picture:
            heat_map(RoutingProfile.load(profile), ExpertPlan.load(plan)).savefig(picture, dpi=110, format="png")
    card = trained[0] / "README.md"
    write_text(card, card_text(record, trained[0].name, has_picture))
    return card


def card_text(record: Record, kind: str, has_picture: bool = False) -> str:
    """A card in the Hub's form.

    Args:
        kind: "adapter" or "model", what was saved.
    """
    config, training = record.get("config", {}), record.get("training", {})
    model, data = _shared(record["model"]["name"]), _shared(record["data"]["name"])
    name = one_line(f"{Path(model).name}, {record['name']}, on {data}")
    blocks = [f"---\n{_metadata(record, kind, name)}\n---", f"# {markdown(name)}", _summary(record, kind, model)]
    if has_picture:
        blocks.append(f"![Which experts the router uses, layer by layer; the adapted ones are outlined]({PICTURE})")
    blocks += ["## Use", _usage(model, kind), "## Results", _results(record), "## Training"]
    rows: list[tuple[str, Any]] = [("data", f"{data} ({record['data'].get('train', 0):,} examples)")]
    shown = [key for key in _SHOWN if config.get(key) is not None and not (kind == "model" and key in _ADAPTER)]
    config = config | ({"rule": record["plan"]["rule"]} if record.get("plan", {}).get("rule") else {})
    rows += [(key, config[key]) for key in shown if key != "epochs" or config.get("max_steps") is None]
    best = training.get("best_step") if config.get("load_best") else None
    extended = ", ".join(str(part["step"]) for part in training.get("extended") or ()) or None
    rows += [("weights after step", best), ("steps", training.get("steps")), ("extended after step", extended)]
    rows += [("tokens read", training.get("tokens"))]
    blocks += [_table(("option", "value"), rows), "## Made with"]
    environment = record.get("environment", {})
    rows = [
        (key, environment[key]) for key in ("hotlora", "transformers", "peft", "trl", "torch") if key in environment
    ]
    blocks.append(_table(("library", "version"), rows))
    return "\n\n".join(blocks) + "\n"


def write_export_card(
    folder: str | os.PathLike[str],
    format: str,
    model: str,
    adapters: Sequence[str | os.PathLike[str]],
    room: "Room | None" = None,
    dropped_router: bool = False,
) -> Path:
    """Writes README.md into what `export_saved` or `combine_saved` made of adapters of runs, or of adapters alone;
    returns its path.

    format: vllm, sglang, sglang-shared, peft, gguf, mlx, merged, or combined. room: what it takes on a server.
    dropped_router: what the adapters learned for routers was left out.
    """
    folder = Path(folder)
    runs = [Path(adapter).parent for adapter in adapters]
    records = [read_record(run) for run in runs if (run / "run.json").is_file()]
    into_base = (folder / "base").is_dir()
    kind = "model" if format == "merged" else "adapter"
    place = folder / "adapter" if into_base else folder
    base = "../base" if into_base else _shared(model)
    made = f"{Path(_shared(model)).name}, {_MADE[format]}"
    head = _head(model, kind, has_base=not into_base)
    text = [f"---\n{head}\n---", f"# {markdown(made)}", _origin(records, model, format)]
    if into_base:
        text.append("It needs the base beside it, into which a part of the adapter was folded, not the original model.")
    if dropped_router:
        text.append(
            "What it learned for the routers was left out (`--drop-router`), and all the rest was trained with that: "
            "its answers are not those of the adapter as it was trained. Evaluate it before you use it."
        )
    text += ["## Use", _export_usage(format, one_line(base), place)]
    if kind == "adapter":
        text.append(size_told(place, room))
    if len(records) == 1 and not dropped_router:
        text += [
            "## Results",
            "Of the adapter as it was trained, before it was written in this form.",
            _results(records[0]),
        ]
    write_text(place / "README.md", "\n\n".join(text) + "\n")
    if into_base:
        told = (
            f"{_code(_shared(model))} with those updates of an adapter folded in that {_SERVERS[format]} cannot hold. "
            "It belongs to the adapter beside it: serve the two together."
        )
        head = f"---\n{_head(model, 'model')}\n---"
        write_text(folder / "base" / "README.md", "\n\n".join([head, f"# {markdown(made)}: its base", told]) + "\n")
    return place / "README.md"


def size_told(folder: Path, room: "Room | None") -> str:
    """How large an exported adapter is, and what a server keeps for it."""
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".safetensors", ".gguf"))
    told = f"The adapter's file has {human_bytes(size)}."
    if room is None:
        return told
    return (
        f"{told} A server keeps {human_bytes(room.place_bytes)} in {room.dtype} for each adapter that may run at once "
        f"({room.option}), whatever it has: all experts, hot or cold, at rank {room.r}."
    )


def _origin(records: Sequence[Record], model: str, format: str) -> str:
    what = "A merged checkpoint" if format == "merged" else "A LoRA adapter"
    of = " and ".join(f"{_code(record['name'])} on {markdown(_shared(record['data']['name']))}" for record in records)
    trained = f"trained as {of}, " if of else ""
    return f"{what} for {_code(_shared(model))}, {trained}written by hotlora."


def _export_usage(format: str, base: str, folder: Path) -> str:
    if format == "merged":
        return "It is a plain checkpoint of transformers, which any engine loads."
    if format == "combined":
        return _usage(base, "adapter")
    if format == "gguf":
        return f"""    python convert_hf_to_gguf.py {base} --outfile base.gguf      # of llama.cpp's repository
    llama-server -m base.gguf --lora PATH/TO/THIS/FOLDER/adapter.gguf

for llama.cpp, which does not say so where it leaves an update out: `hotlora verify --engine llama.cpp` looks."""
    if format == "mlx":
        return f"""    mlx_lm.generate --model {base} --adapter-path PATH/TO/THIS/FOLDER --prompt "…"

for mlx-lm."""
    config = read_json(folder / "adapter_config.json")
    if format == "peft":
        from ..hf.models import NANOS

        of_nano = f"\n{base} is a part of hotlora: hotlora.load_model({base!r}) loads it.\n" if base in NANOS else ""
        return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base_model = AutoModelForCausalLM.from_pretrained({base!r})
model = PeftModel.from_pretrained(base_model, "PATH/TO/THIS/FOLDER")  # hotlora is not needed
```
{of_nano}
PEFT loads several such adapters into one model only if they adapt the same places: routers, shared experts, layers."""
    if format == "vllm":
        from ..adapter.formats.vllm import room_for

        flags = f"--enable-lora --max-lora-rank {room_for(config['r'])} --lora-modules mine=PATH/TO/THIS/FOLDER"
        return f"""    vllm serve {base} {flags}

for vLLM, which reads one pair of matrices for each expert. Where it holds a family's experts fused (gpt_oss,
Qwen3-VL-MoE, Qwen3.5-MoE), add `--enable-mixed-moe-lora-format`. `hotlora verify --engine vllm` says whether it applies
every update."""
    flag, more = "", ""
    if format == "sglang-shared":
        flag = " --experts-shared-outer-loras"
        more = (
            " All adapters of one server must share factors so; one that was begun without the flag, and without such "
            "an adapter, loads this one, and applies another update."
        )
    return f"""    python -m sglang.launch_server --model-path {base} --enable-lora --max-loras-per-batch 2{flag} \\
        --lora-paths mine=PATH/TO/THIS/FOLDER

for SGLang.{more} `hotlora verify --engine sglang` says whether it applies every update."""


def _head(model: str, kind: str, *, has_base: bool = True, **results: Any) -> str:
    name = _shared(model)
    may_be = _HUB_ID.fullmatch(name) is not None and can_be_on_hub(name)
    is_on_hub = (
        has_base and may_be and (not _exists(model) if name == model else "/" in name)
    )  # or in the Hub's cache here
    tags = ["hotlora", "mixture-of-experts", *(["lora"] if kind == "adapter" else [])]
    return ModelCardData(
        base_model=name if has_base and is_on_hub else None, pipeline_tag="text-generation", tags=tags,
        library_name="peft" if kind == "adapter" else "transformers", **results,
    ).to_yaml()  # fmt: skip


def _metadata(record: Record, kind: str, name: str) -> str:
    model, results = record["model"]["name"], []
    for task, found in (record.get("evaluation") or {}).items():
        results.append(
            EvalResult(
                task_type="text-generation", dataset_type=task, dataset_name=task, metric_type=found["metric"],
                metric_value=round(100 * found["accuracy"], 2), metric_name=f"{found['metric']}, %",
            )
        )  # fmt: skip
    return _head(model, kind, model_name=name if results else None, eval_results=results or None)


def _summary(record: Record, kind: str, model: str) -> str:
    parameters, plan = record["parameters"], record.get("plan", {})
    percent = 100 * parameters["trainable"] / max(parameters["total"], 1)
    share = f"{parameters['trainable']:,} trained parameters ({percent:.2f}%)"
    if kind == "model":
        return f"{_code(model)}, fine-tuned in full: {share}."
    rule = f", chosen by the rule {_code(plan['rule'])}" if plan.get("rule") else ""
    return (
        f"A LoRA adapter for {_code(model)} on planned experts{rule}: {share}. Made by hotlora, which adapts the "
        "experts that the router really uses."
    )


def _usage(model: str, kind: str) -> str:
    if kind == "model":
        return "It is a plain checkpoint of transformers."
    model = one_line(model)
    return f"""```python
import hotlora

model, tokenizer = hotlora.load("PATH/TO/THIS/FOLDER")  # onto {model}; or hotlora.load(…, model="PATH/TO/BASE")
```

or `hotlora chat FOLDER`; of an adapter on the Hub its name does in place of the folder. Plain PEFT does not know its
layers on experts: `hotlora export --format peft` writes an adapter that it loads, `--format vllm` and `--format sglang`
what servers load, `hotlora merge` a plain checkpoint."""


def _results(record: Record) -> str:
    training, rows = record.get("training", {}), []
    for task, found in (record.get("evaluation") or {}).items():
        low, high = 100 * found["ci_low"], 100 * found["ci_high"]
        score = f"{100 * found['accuracy']:.1f}% [{low:.1f} to {high:.1f}]"
        rows.append((f"{markdown(task)}, {found['metric']} on {found['n']:,} examples", score))
    if "test_loss" in training:
        before = f", {loss_word(training['test_loss_before'])} before" if "test_loss_before" in training else ""
        rows.append(("held-out response loss, nats a token", f"{loss_word(training['test_loss'])}{before}"))
    if not rows:
        return "It was not evaluated."
    note = "\n\nThe brackets are 95% intervals over test examples." if record.get("evaluation") else ""
    return _table(("", "result"), rows) + note


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    lines += [f"| {name} | {value:,} |" if isinstance(value, int) and not isinstance(value, bool)
              else f"| {name} | {_cell(value)} |" for name, value in rows if value is not None]  # fmt: skip
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return markdown(str(value))


def _code(text: str) -> str:
    """As code within a line, which no backtick ends."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # also of what no path can be: too long, a NUL, no such user


def _shared(name: str) -> str:
    """A file or folder without where it lies on this machine, which is nobody else's business."""
    name = name.replace("\\", "/")  # of Windows
    task = without_parts(name)
    if "/" in name[len(task) :]:  # a task with its files; openai/gsm8k:main is on the Hub
        return task
    is_local = name.startswith((".", "/", "~")) or name[1:2] == ":" or _exists(name) or name.count("/") > 1
    return public_name(name) if is_local or Path(name).suffix in (".jsonl", ".json", ".txt", ".csv") else name
