"""Run every MoE family of the installed transformers on a tiny model, and write what came out to docs/models.md.

python scripts/models.py                     # all: docs/models/transformers-VERSION.json, then the page
python scripts/models.py --only olmoe zaya   # some: printed, nothing written
python scripts/models.py --page              # the page, from the records that are there
"""

import argparse
import gc
import importlib.metadata
import json
import platform
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS, PAGE = ROOT / "docs" / "models", ROOT / "docs" / "models.md"
PACKAGES = ("hotlora", "transformers", "peft", "torch", "safetensors")
COLUMNS = {
    "profile": "profile",
    "adapt": "adapt",
    "train": "train",
    "packing": "packing",
    "aux": "aux loss",
    "answers": "answers",
    "save": "save",
    "merge": "merge",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "peft": "PEFT",
    "merged": "merged",
}
MARKS = {"passed": "✓", "partly": "(✓)", "refused": "–", "failed": "✗"}
STEPS, LEARNING_RATE, EXAMPLES = 8, 5e-3, 8
NOISY = ("phimoe",)
"""families whose router is noisy in training"""


class Refused(Exception):
    """What a user is told, at once, that the family does not do."""


# Checks. Each raises where it fails, and gives notes on what was left out of it.


def check_profile(family: str, folder: Path) -> list[str]:
    from test_families import BATCH, SKIPS, zoo_model
    from zoo import runs_of

    from hotlora.hf.moe_layers import moe_layers
    from hotlora.routing.profiler import profile_routing

    model = zoo_model(family)
    profile = profile_routing(model, [BATCH])
    assigned = profile.num_tokens * profile.num_experts_per_tok
    rows = profile.counts.sum(dim=1).tolist()
    if family in SKIPS:
        assert all(0 < row <= assigned for row in rows), f"rows sum to {rows}, tokens × K is {assigned}"
        return ["The router may choose no expert for a token, so a row sums to less than tokens × K."]
    runs = runs_of(family, moe_layers(model))
    assert rows == [assigned * n for n in runs], f"rows sum to {rows}, tokens × K is {assigned}"
    return []


def check_adapt(family: str, folder: Path) -> list[str]:
    import torch
    from test_families import adapted, logits, test_output_and_every_gradient_equal_plain_code, zoo_model

    same = torch.equal(logits(adapted(family, randomise=False)), logits(zoo_model(family)))
    assert same, "with B = 0 the logits are not the base's"
    test_output_and_every_gradient_equal_plain_code(family)
    return []


def check_train(family: str, folder: Path) -> list[str]:
    """As `hotlora train` does it; the loss is the one that it takes on held-out data."""
    import torch

    from hotlora.evaluation.score import response_loss

    model = _to_train(family)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = response_loss(model, *_data())
    _train(model, folder, max_steps=STEPS)
    after = response_loss(model, *_data())
    assert after < before, f"the loss went from {before:.4f} to {after:.4f}"
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert all("lora_" in name for name in changed), f"the base changed: {sorted(changed)[:3]}"
    for part, names in _adapted_parts(model).items():
        still = [name for name in names if not any(c.startswith(f"base_model.model.{name}.") for c in changed)]
        assert not still, f"no step reached {part}: {still[:3]}"
    return []


def check_packing(family: str, folder: Path) -> list[str]:
    """Refused, or each example's loss in a packed row is what it is alone."""
    from hotlora.base.errors import ModelError
    from hotlora.evaluation.score import response_loss

    model = _to_train(family)
    expected = response_loss(model, *_data())
    try:
        loss = _train(model, folder, max_steps=1, packing=True, batch_size=EXAMPLES).loss_first
    except ModelError as error:
        raise Refused(
            "Refused: examples that are packed into one row would see each other."
            if "see each other" in str(error)
            else "Refused on a CPU: packed examples need the kernels of causal_conv1d or mamba_ssm."
        ) from error
    assert family in NOISY or abs(loss - expected) < 1e-4 * expected, f"the loss is {loss:.4f}, alone {expected:.4f}"
    return []


def check_aux(family: str, folder: Path) -> list[str]:
    """Refused, or the loss has the auxiliary one added."""
    from hotlora.base.errors import HotLoraError
    from hotlora.evaluation.score import response_loss

    model = _to_train(family)
    expected = response_loss(model, *_data())
    try:
        loss = _train(model, folder, max_steps=1, aux_loss_coef=10.0, batch_size=EXAMPLES).loss_first
    except HotLoraError as error:
        raise Refused("Refused: transformers computes no load-balancing loss for this family.") from error
    assert loss > expected + 1, f"the loss is {loss:.4f}, without it {expected:.4f}"  # 10 at least, by its definition
    return []


def check_answers(family: str, folder: Path) -> list[str]:
    """Each prompt's answer in a batch is its answer alone."""
    from hotlora.evaluation.generate import answer_batches
    from hotlora.tasks import Example

    tokenizer, _ = _data()
    examples = [Example(prompt, "") for prompt in ("aaaaa", "bbbbbbbbb", "cc", "ddddd")]
    model = _to_train(family).eval()

    def answers(some: list[Any], batch_size: int) -> tuple[dict[str, str], int]:
        batches = list(answer_batches(model, tokenizer, some, max_new_tokens=6, batch_size=batch_size))
        return {some[a.index].prompt: a.text for batch in batches for a in batch}, len(batches)

    together, num_batches = answers(examples, 8)
    alone = {prompt: text for example in examples for prompt, text in answers([example], 1)[0].items()}
    assert together == alone, "answers depend on the batch"
    return [] if num_batches == 1 else ["Padding changes the logits, so prompts of one length alone go together."]


def check_save(family: str, folder: Path) -> list[str]:
    import torch
    from test_families import adapted, logits, zoo_model

    from hotlora.adapter.load import load_adapter

    model = adapted(family)
    model.save_pretrained(folder)
    loaded = logits(load_adapter(zoo_model(family), folder))
    assert torch.equal(loaded, logits(model)), "the loaded adapter's logits are others"
    assert not torch.equal(loaded, logits(zoo_model(family))), "the adapter changes nothing"
    return []


def check_merge(family: str, folder: Path) -> list[str]:
    from test_families import adapted, logits

    model = adapted(family)
    expected = logits(model)
    _same(logits(model.merge_and_unload()), expected)
    return []


def check_served(family: str, folder: Path, format: str) -> list[str]:
    """With the routers merged, base and adapter as the server puts them together."""
    from readers import logits, read_sglang, read_vllm
    from test_export import RENAMED, base_of, merged_attention

    from hotlora.adapter.formats.export import export_adapter
    from hotlora.adapter.formats.import_peft import import_adapter
    from hotlora.base.errors import FileError

    model, left_out = _to_export(family)
    merged = merged_attention(family, format)  # what vLLM would not apply
    export_adapter(model, folder / "out", format=format, merge_router=True, **merged)
    adapter, base = folder / "out" / "adapter", base_of(folder / "out" / "base", family)
    if family not in RENAMED:
        read = {"vllm": read_vllm, "sglang": read_sglang}[format]
        _same(logits(read(adapter, base)), logits(model))
        return left_out
    try:
        imported = import_adapter(base, adapter)
    except FileError:
        return [*left_out, "Written, and not read back: its checkpoints have names that the readers do not know."]
    _same(logits(imported), logits(model))
    return [*left_out, "Read back by hotlora's own `import_adapter`, and not by the server's rules."]


def check_merged(family: str, folder: Path) -> list[str]:
    from readers import logits
    from test_export import adapted, base_of

    from hotlora.adapter.formats.export import export_adapter

    model = adapted(family)
    export_adapter(model, folder / "out", format="merged")
    _same(logits(base_of(folder / "out", family)), logits(model))
    return []


def check_peft(families: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Of all families at once: plain PEFT is a process of its own that never saw hotlora."""
    from readers import logits, plain_peft_logits

    from hotlora.adapter.formats.export import export_adapter

    folder.mkdir()

    cases, ours, results = {}, {}, {}
    for family in families:

        def write(family: str = family) -> list[str]:
            model, left_out = _to_export(family)
            cases[family] = (family, export_adapter(model, folder / family, format="peft"))
            ours[family] = logits(model)
            return left_out

        results[family] = _result(write)
    found, said = plain_peft_logits(cases, folder)
    for family, expected in ours.items():
        reason = next((line for line in said.splitlines() if line.startswith(f"{family}: ")), "")
        if family not in found:
            results[family] = {"result": "failed", "notes": [f"PEFT does not load it: {reason.partition(': ')[2]}"]}
        elif (worse := _result(lambda f=family, e=expected: _same(found[f], e)))["result"] == "failed":
            results[family] = worse
    return results


def _to_train(family: str) -> Any:
    from peft import get_peft_model
    from test_families import plan_for
    from zoo import zoo_model

    from hotlora.adapter.config import HotLoraConfig

    model = zoo_model(family, vocab_size=259)
    return get_peft_model(model, HotLoraConfig(plan=plan_for(model), r=4))


@cache
def _data() -> tuple[Any, Any]:
    """(a tokenizer, tokenized examples)."""
    from tiny_tokenizer import byte_tokenizer

    from hotlora.tasks import Example
    from hotlora.tasks.tokens import tokenize

    tokenizer = byte_tokenizer()
    examples = [Example(f"{i} and {i % 7}", f" make {i + i % 7}") for i in range(EXAMPLES)]
    return tokenizer, tokenize(examples, tokenizer, 64)


def _train(model: Any, folder: Path, **options: Any) -> Any:
    from hotlora.training.config import TrainConfig
    from hotlora.training.trainer import train

    config = {"batch_size": 4, "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "max_length": 64, "r": 4}
    tokenizer, dataset = _data()
    return train(model, tokenizer, dataset, TrainConfig(**config | options), folder)


def _to_export(family: str) -> tuple[Any, list[str]]:
    from test_export import RAW_SHARED, adapted

    if family in RAW_SHARED:
        note = "Without the shared experts: they are 3-D weights, which only `save_pretrained` and `merged` hold."
        return adapted(family, train_shared=False), [note]
    return adapted(family), []


def _same(found: Any, expected: Any) -> list[str]:
    difference = ((found - expected).norm() / expected.norm()).item()
    assert difference <= 1e-5, f"the logits differ by {difference:.1e} of their norm"
    return []


def _adapted_parts(model: Any) -> dict[str, list[str]]:
    """Experts, routers, attention and shared experts of an adapted model, by module path in the base."""
    from hotlora.hf.moe_layers import attention_modules, moe_layers

    base = model.get_base_model()
    layers = moe_layers(base)
    return {
        "experts": [layer.experts for layer in layers],
        "routers": [layer.router for layer in layers],
        "attention": attention_modules(base),
        "shared experts": [path for layer in layers for path in layer.shared],
    }


def _result(check: Callable[[], list[str]]) -> dict[str, Any]:
    try:
        notes = check()
    except Refused as told:
        return {"result": "refused", "notes": [str(told)]}
    except Exception as error:  # whatever it is, it is what the table is to tell
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        return {"result": "failed", "notes": [f"{type(error).__name__}: {lines[0]}"[:300]]}
    return {"result": "partly", "notes": notes} if notes else {"result": "passed"}


# What a family is built of


def layout(model: Any) -> dict[str, Any]:
    """Where transformers' own flags are too many for a table, the words of the page."""
    from hotlora.hf.experts_view import ExpertsView
    from hotlora.hf.moe_layers import moe_layers, unwrap

    layers = moe_layers(model)
    experts = unwrap(model.get_submodule(layers[0].experts))
    router, block = f"{layers[0].router}.{layers[0].router_weight}", layers[0].experts.rpartition(".")[0]
    return {
        "router": router.removeprefix(f"{block}.").removesuffix(".weight"),
        "shared": _shared(model, [path for layer in layers for path in layer.shared]),
        "experts": ExpertsView(experts).names_of_layout,
        "attention": _attention(model),
    }


def _shared(model: Any, paths: list[str]) -> str:
    import torch

    if not paths:
        return "none"
    if not isinstance(model.get_submodule(paths[0]), torch.nn.Linear):
        return "3-D weights"
    return "yes" if "shared" in paths[0] else "dense mlp"


def _attention(model: Any) -> list[str]:
    from hotlora.hf.moe_layers import attention_modules

    decoder = model.get_decoder()
    prefix = next((f"{path}." for path, module in model.named_modules() if module is decoder), "")
    adapted, kinds = attention_modules(model), set()
    for index, layer in enumerate(decoder.layers):
        here = [path for path in adapted if path.startswith(f"{prefix}layers.{index}.")]
        names = {path.rpartition(".")[2] for path in here}
        classes = " ".join(f"{name} {type(child).__name__}" for name, child in layer.named_children())
        if "kv_b_proj" in names:
            kinds.add("MLA")
        elif re.search(r"Delta|Lightning|LinearAttention", classes):
            kinds.add("linear")
        elif "kv_proj" in names:
            kinds.add("one k = v")
        elif names:
            kinds.add("full")
        elif found := re.search(r"mamba|conv", classes, re.IGNORECASE):
            kinds.add({"mamba": "Mamba", "conv": "convolution"}[found[0].lower()])
    return sorted(kinds, key=["full", "one k = v", "MLA", "linear", "convolution", "Mamba"].index)


# Families that cannot be adapted


def refusals() -> dict[str, dict[str, str]]:
    """model_type -> its class and hotlora's error, of every other family of text models with MoE layers."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
    from zoo import NOT_CAUSAL, decorated_folders, families

    from hotlora.base.errors import HotLoraError
    from hotlora.hf.models import model_from_config

    package = Path(transformers.__file__).parent / "models"
    moe = re.compile(r"^class \w*(Moe|MoE|Experts|SparseMLP)\w*\(", re.MULTILINE)
    folders = {file.parent.name for file in package.glob("*/modeling_*.py") if moe.search(file.read_text())}
    folders = folders - decorated_folders() | NOT_CAUSAL.keys()
    # What the default config lacks to be one with MoE layers, or to be built at all.
    needed: dict[str, dict[str, Any]] = {
        "dbrx": {"attn_config": {"rope_theta": 1e4}},
        "doge": {"is_moe": True},
        "diffusion_gemma": {"text_config": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16}},
    }
    kinds = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "TOKEN_CLASSIFICATION")
    found = {}
    for kind in kinds:
        for model_type, name in getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES").items():
            if model_type in families() or model_type in found or model_type_to_module_name(model_type) not in folders:
                continue
            with tempfile.TemporaryDirectory() as folder:
                CONFIG_MAPPING[model_type](**needed.get(model_type, {})).save_pretrained(folder)
                try:
                    model_from_config(folder)
                    error = "none: it is adapted"
                except HotLoraError as raised:
                    error = str(raised)
            found[model_type] = {"class": name, "error": error}
    return dict(sorted(found.items()))


# The record


def record(only: list[str]) -> dict[str, Any]:
    """Runs the checks of all families, or of those named."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers.utils import logging
    from zoo import families, zoo_model

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    if unknown := sorted(set(only) - families().keys()):
        sys.exit(f"no such family in the installed transformers: {', '.join(unknown)}")
    names, entries, start = only or list(families()), {}, time.monotonic()
    _data()
    gc.freeze()  # or to look through all that was imported, at each training's start and end, takes half of the time
    with tempfile.TemporaryDirectory() as root:
        for family in names:
            entry: dict[str, Any] = {"class": families()[family], "layout": layout(zoo_model(family)), "checks": {}}
            for name in COLUMNS:
                if name != "peft":
                    folder = Path(root) / family / name
                    folder.mkdir(parents=True)
                    entry["checks"][name] = _result(lambda f=family, n=name, at=folder: _check(n, f, at))
            entries[family] = entry
            print(family, {name: check["result"] for name, check in entry["checks"].items()}, flush=True)
        for family, result in check_peft(names, Path(root) / "peft").items():
            checks = entries[family]["checks"] | {"peft": result}
            entries[family]["checks"] = {name: checks[name] for name in COLUMNS}
    return {
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in PACKAGES},
        "date": date.today().isoformat(),
        "seconds": round(time.monotonic() - start),
        "families": entries,
        "refused": refusals(),
    }


def _check(name: str, family: str, folder: Path) -> list[str]:
    if name in ("vllm", "sglang"):
        return check_served(family, folder, name)
    checks: dict[str, Callable[[str, Path], list[str]]] = {
        "profile": check_profile,
        "adapt": check_adapt,
        "train": check_train,
        "packing": check_packing,
        "aux": check_aux,
        "answers": check_answers,
        "save": check_save,
        "merge": check_merge,
        "merged": check_merged,
    }
    return checks[name](family, folder)


def write_record(data: dict[str, Any]) -> Path:
    """One line a family, so that two records can be compared line by line."""
    blocks = []
    for key, value in data.items():
        if key in ("families", "refused"):
            lines = [
                f"    {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in value.items()
            ]
            blocks.append(f"  {json.dumps(key)}: {{\n" + ",\n".join(lines) + "\n  }")
        else:
            blocks.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    path = RECORDS / f"transformers-{data['versions']['transformers']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")
    return path


# The page


def page() -> str:
    """docs/models.md from the records."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in RECORDS.glob("transformers-*.json")]
    records.sort(key=lambda r: tuple(map(int, r["versions"]["transformers"].split("."))), reverse=True)
    notes: list[str] = []
    rows = _family_rows(records, notes)
    runs = [", ".join(f"{name} {version}" for name, version in r["versions"].items()) for r in records]
    lines = [
        "# Models",
        "",
        "Which Mixture-of-Experts families work, and what was run to say so. Each family was built from transformers'",
        "own code as a tiny model with random weights (3 to 5 layers, 8 experts, width 32, float32, on the CPU) and",
        "went through the checks below; no pretrained checkpoint and no server took part. `python scripts/models.py`",
        "runs them all with the installed transformers and writes this page; the records are in [models/](models).",
        "The whole suite is run with the oldest versions that hotlora allows, the pinned and the newest:",
        "`make test-matrix`.",
        "",
        *(f"- {r['date']}: {run}" for r, run in zip(records, runs, strict=True)),
        "",
        "| transformers | families | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---:" + "|---:" * len(COLUMNS) + "|",
        *(_summary_row(r) for r in records),
        "",
        "Passed in full; in brackets, passed with a part left out (the notes under the long table); the others are",
        "refused with an error before anything long begins. An empty cell is of a record that is older than the check;",
        "there the training was 8 AdamW steps in a loop of the script's own.",
        "",
        "| column | what passed |",
        "|---|---|",
        "| profile | every token's K choices are counted: each layer's row sums to tokens × K (times its runs, in a "
        "model that loops over layers) |",
        "| adapt | with B = 0 the logits are the base's bit for bit; with random factors the logits and every factor's "
        "gradient (experts, routers, attention, shared experts) equal those of plain code with the updates added by "
        "hand |",
        f"| train | {STEPS} steps of `training.trainer.train` lower the loss `hotlora train` takes on held-out data, "
        "reach every adapted module, and change adapters only |",
        "| packing | with `--packing` the loss of a packed row is that of its examples, each alone |",
        "| aux loss | with `--aux-loss-coef` the load-balancing loss is added |",
        "| answers | a prompt's answer in a batch is its answer alone |",
        "| save | saved and loaded again, the logits are the same bit for bit |",
        "| merge | `merge_and_unload()` gives the adapted model's logits |",
        "| vLLM, SGLang | exported with `merge_router=True`; base and adapter, put together by the server's rules "
        "(tests/readers.py), give the adapted model's logits |",
        "| PEFT | exported, then loaded by plain PEFT in a process without hotlora: the adapted model's logits |",
        "| merged | exported as a checkpoint, then loaded by transformers: the adapted model's logits |",
        "",
        "## Families",
        "",
        "The family is the config's `model_type`. *in*: the versions of transformers that have it, of those above.",
        "*experts*: what differs from gate, up and down in `[E, out, in]` without biases, gate rows first.",
        "*attention*: q, k, v, o (full) or what they are split into or fused in (MLA; linear attention; one projection",
        "for k and v), and what other layers have in its place and keep as it is (Mamba, convolution).",
        "",
        "| family | in | router | shared | experts | attention | " + " | ".join(COLUMNS.values()) + " |",
        "|---|---|---|---|---|---" + "|:---:" * len(COLUMNS) + "|",
        *rows,
        "",
        *(f"- {_letter(index)}: {note}" for index, note in enumerate(notes)),
        "",
        "## Families that are refused",
        "",
        "Text models with MoE layers that hotlora does not adapt, and the error that `load_model` raises before any",
        "weight is read.",
        "",
        *_refused_lines(records),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _summary_row(data: dict[str, Any]) -> str:
    entries = data["families"].values()
    cells = []
    for name in COLUMNS:
        results = [entry["checks"][name]["result"] for entry in entries if name in entry["checks"]]
        if not results:  # the record is older than the check
            cells.append("")
            continue
        partly = results.count("partly")
        cells.append(f"{results.count('passed')}" + (f" ({partly})" if partly else ""))
    return f"| {data['versions']['transformers']} | {len(entries)} | " + " | ".join(cells) + " |"


def _family_rows(records: list[dict[str, Any]], notes: list[str]) -> list[str]:
    rows = []
    for family in sorted({name for data in records for name in data["families"]}):
        found = {d["versions"]["transformers"]: d["families"][family] for d in records if family in d["families"]}
        words = next(iter(found.values()))["layout"]  # the newest
        cells = [
            f"`{family}`",
            ", ".join(version.rpartition(".")[0] for version in reversed(found)),
            f"`{words['router']}`",
            words["shared"] if words["shared"] != "none" else "–",
            ", ".join(words["experts"]) or "–",
            " + ".join(words["attention"]),
            *(
                _cell({v: entry["checks"][name] for v, entry in found.items() if name in entry["checks"]}, notes)
                for name in COLUMNS
            ),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(checks: dict[str, dict[str, Any]], notes: list[str]) -> str:
    """The worst result of all versions, with its notes; a note names its version where the others differ."""
    if not checks:
        return ""
    worst = max((check["result"] for check in checks.values()), key=list(MARKS).index)
    letters = []
    for version, check in checks.items():
        for note in check.get("notes", []):
            same = all(other == check for other in checks.values())
            text = note if same else f"transformers {version}: {note}"
            if text not in notes:
                notes.append(text)
            letters.append(_letter(notes.index(text)))
    return MARKS[worst] + (f"<sup>{','.join(dict.fromkeys(letters))}</sup>" if letters else "")


def _letter(index: int) -> str:
    return chr(ord("a") + index)


def _refused_lines(records: list[dict[str, Any]]) -> list[str]:
    """One block for each error, without the family's name in it."""
    said: dict[str, list[str]] = {}
    for family in sorted({name for data in records for name in data["refused"]}):
        found = {d["versions"]["transformers"]: d["refused"][family] for d in records if family in d["refused"]}
        error = re.sub(r"\b(this|a|an) [\w-]+ model", r"\1 … model", next(iter(found.values()))["error"])
        adapted = any(family in data["families"] for data in records)
        only = f" (transformers {', '.join(found)})" if adapted else ""
        said.setdefault(error, []).append(f"`{family}`{only}")
    return [line for error, names in said.items() for line in (", ".join(names) + ":", "", f"> {error}", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY")
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args()
    if not args.page:
        data = record(args.only)
        failed = {
            f"{family}, {name}: {check['notes'][0]}"
            for family, entry in data["families"].items()
            for name, check in entry["checks"].items()
            if check["result"] == "failed"
        }
        if args.only:
            print(json.dumps(data, indent=2, ensure_ascii=False))
        else:
            print(f"wrote {write_record(data).relative_to(ROOT)}")
    if not args.only:
        PAGE.write_text(page(), encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    if not args.page and failed:
        sys.exit("failed:\n" + "\n".join(sorted(failed)))


if __name__ == "__main__":
    main()
