"""Files of every format, broken at random: what reads them must end well or with one HotLoraError, and change nothing.

`targets` makes a whole file of each format, beside what reads it; `breaks` breaks it, by its bytes or, where it holds
JSON or tensors, by its values. test_fuzz_files gives each target some inputs, scripts/reliability.py many more.
"""

import base64
import copy
import gzip
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import torch
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import tiny_batch, tiny_config, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer

from hotlora import (
    ExpertPlan,
    HotLoraConfig,
    RoutingProfile,
    import_profile,
    import_scores,
    load_adapter,
    select_experts,
)
from hotlora.adapter.count import parameters_from_config
from hotlora.adapter.formats.import_peft import import_adapter
from hotlora.adapter.mask import SparseMask
from hotlora.base.errors import DataError, HotLoraError
from hotlora.base.records import find_records, new_record, read_record, read_results, write_record
from hotlora.base.tensor_files import save_tensors
from hotlora.evaluation.generations import read_generations
from hotlora.evaluation.stats import proportion_interval
from hotlora.hf.models import load_model, load_tokenizer
from hotlora.report.comparison import as_dict, compare_runs
from hotlora.report.leaderboard import leaderboard
from hotlora.report.leaderboard_folder import add_runs
from hotlora.report.leaderboard_page import as_dict as board_dict
from hotlora.report.leaderboard_page import markdown_tables
from hotlora.report.rows import table_rows
from hotlora.report.sections import read_sections
from hotlora.report.tables import conditions_table
from hotlora.routing.profiler import profile_routing
from hotlora.tasks import TASKS, get_task
from hotlora.tasks.data import load_examples
from hotlora.tasks.tokens import tokenize
from hotlora.training import checkpoints

_SMALL = st.one_of(st.integers(-3, 40), st.floats(allow_infinity=True), st.sampled_from([0.5, -0.0, 1e308]))
_TEXT = st.text(max_size=8)


def _values(numbers: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        st.one_of(st.none(), st.booleans(), numbers, _TEXT),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4),
        max_leaves=6,
    )


# Sizes of a model or an adapter: a right one that is large would be made.
SMALL = _values(_SMALL)
VALUES = _values(st.one_of(_SMALL, st.sampled_from([2**31, -(2**63), 10**30, 10**400])))


@dataclass(frozen=True)
class Target:
    """A whole file and what reads it."""

    name: str
    file: Path
    read: Callable[[], Any]
    kind: str
    """bytes, json, lines (of JSON) or tensors"""
    values: st.SearchStrategy[Any] = VALUES

    def inputs(self) -> st.SearchStrategy[bytes]:
        content = self.file.read_bytes()
        ways = [_broken_bytes(content)]
        if self.kind == "json":
            value = json.loads(content)
            ways += [_changed(value, self.values).map(_json)] * 3
        elif self.kind == "lines":
            rows = [json.loads(line) for line in content.splitlines()]
            ways += [_changed(rows, self.values).map(_lines)] * 3
        elif self.kind == "tensors":
            ways += [_changed_tensors(self.file, self.values)] * 3
        return st.one_of(ways)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _lines(rows: Any) -> bytes:
    return b"".join(_json(row) + b"\n" for row in rows) if isinstance(rows, list) else _json(rows)


@st.composite
def _broken_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut short, bits flipped, pieces left out, put in or said twice; or something else altogether."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), at + draw(st.integers(1, 30)))
        way = draw(st.sampled_from(["flip", "flip", "cut", "leave", "put", "twice", "other"]))
        if way == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif way == "cut":
            del data[at:]
        elif way == "leave":
            del data[at:end]
        elif way == "put":
            data[at:at] = draw(st.binary(max_size=20))
        elif way == "twice":
            data[at:at] = data[at:end]
        elif way == "other":
            data = bytearray(
                draw(st.sampled_from([b"", b"\0" * 8, b"[" * 100_000, b"1" * 5000, b"\xff", b"{}", b"null"]))
            )
    return bytes(data)


@st.composite
def _changed(draw: st.DrawFn, value: Any, values: st.SearchStrategy[Any]) -> Any:
    """One to three values of some JSON replaced, left out or under another key."""
    whole = [copy.deepcopy(value)]
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = whole
        key: Any = 0
        while isinstance(holder[key], dict | list) and holder[key] and draw(st.integers(0, 4)):
            holder = holder[key]
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
        way = draw(st.sampled_from(["replace", "replace", "leave", "rename", "twice"]))
        if way == "leave" and holder is not whole:
            del holder[key]
        elif way == "rename" and isinstance(holder, dict):
            holder[draw(_TEXT)] = holder.pop(key)
        elif way == "twice" and isinstance(holder, list) and holder is not whole:
            holder.insert(key, holder[key])
        else:
            holder[key] = draw(values)
    return whole[0]


@st.composite
def _changed_tensors(draw: st.DrawFn, file: Path, values: st.SearchStrategy[Any]) -> bytes:
    """A safetensors file with other tensors or another head, and the right hash of what it holds."""
    with safe_open(file, "pt") as stored:
        tensors, head = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()
    if "json" in head and draw(st.booleans()):
        meta = draw(_changed(json.loads(head["json"]), values))
    else:
        meta = json.loads(head.get("json", "{}"))
        name = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        way = draw(st.sampled_from(["leave", "rename", "dtype", "shape", "scalar", "empty", "nan", "negative"]))
        if way == "rename":
            tensors[draw(_TEXT)] = tensor
        elif way == "dtype":
            tensors[name] = tensor.to(draw(st.sampled_from([torch.bool, torch.uint8, torch.float16, torch.int64])))
        elif way == "shape":
            tensors[name] = tensor.flatten()[: draw(st.integers(0, tensor.numel()))].clone()
        elif way == "scalar":
            tensors[name] = torch.tensor(1.0)
        elif way == "empty":
            tensors[name] = tensor[:0].clone()
        elif way == "nan":
            tensors[name] = torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor * 0
        elif way == "negative":
            tensors[name] = -tensor - 1
    beside = file.with_name("changed.safetensors")
    if "json" in head:
        save_tensors(beside, tensors, meta, format=head["format"], version=head["version"])
    else:
        save_file(tensors, beside, head)
    data = beside.read_bytes()
    beside.unlink()
    return data


def outcome(target: Target, data: bytes) -> str:
    """Gives the broken file to what reads it: "read" or "refused". Any other exception, a message of nothing and a file
    that is changed or left over are bugs."""
    whole = target.file.read_bytes()
    folder = target.file.parent
    target.file.write_bytes(data)
    before = _hashes(folder)
    try:
        target.read()
        found = "read"
    except HotLoraError as error:
        assert len(str(error)) > 20, f"{target.name}: {error!r} says nothing"
        found = "refused"
    finally:
        after = _hashes(folder)
        target.file.write_bytes(whole)
    assert before == after, f"{target.name}: reading changed {sorted(before.items() ^ after.items())}"
    return found


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if tools %}{{ tools }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }}){% endfor %}"
    "<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
# One row of each task's own data.
_CHOICES = {"choices": ["0", "1", "2", "3"], "answer": 1}
ROWS: dict[str, dict[str, Any]] = {
    "gsm8k": {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "spider": {"db_id": "shop", "question": "How many singers?", "query": "SELECT count(*) FROM singer"},
    "hellaswag": {
        "ind": 1, "activity_label": "Roof", "ctx_a": "A man.", "ctx_b": "he", "ctx": "A man. he", "split": "val",
        "endings": ["a", "b", "c", "d"], "label": "3",
    },
    "humaneval": {
        "task_id": "HumanEval/1", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
    },
    "arc_challenge": {
        "id": "x", "answerKey": "2",
        "question": {"stem": "Why?", "choices": [{"text": "a", "label": "1"}, {"text": "b", "label": "2"}]},
    },
    "piqa": {"goal": "Boil", "sol1": "water", "sol2": "stones", "label": 0},
    "boolq": {"question": "is it so", "title": "Fuel", "answer": False, "passage": "All of it."},
    "mmlu": {"question": "Find c.", "subject": "abstract_algebra", **_CHOICES},
    "codealpaca": {"instruction": "Sort", "input": "", "output": "sorted(x)"},
    "saferpaca": {"instruction": "Help", "input": "", "output": "No"},
    "mbpp": {"task_id": 601, "text": "Write f", "code": "def f(): pass", "test_list": ["assert f() is None"]},
    "hexphi": {"prompt": "Do harm"},
    "advbench": {"goal": "Do harm"},
    "malicious_instructions": {"instruction": "Do harm"},
}  # fmt: skip


def targets(folder: Path) -> list[Target]:
    """A whole file of every format, in folders below `folder`."""
    return [
        *_values_files(folder), *_imported_files(folder), *_data_files(folder), *_model_files(folder),
        *_run_files(folder),
    ]  # fmt: skip


def _values_files(folder: Path) -> list[Target]:
    base = tiny_model()
    profile = profile_routing(base, [tiny_batch()], source={"data": "x"})
    at = {
        name: folder / name / name for name in ("profile.safetensors", "mask.safetensors", "plan.json", "scores.json")
    }
    profile.save(at["profile.safetensors"])
    select_experts(profile, fraction=0.25).save(at["plan.json"])
    bits = {"a.lora_B": torch.tensor([255, 3, 0], dtype=torch.uint8)}
    SparseMask(bits, {"a.lora_B": (4, 6)}, 0.4, "model", 0, {"seed": 0}).save(at["mask.safetensors"])
    scores = {str(layer): [float(expert) for expert in range(8)] for layer in profile.layers}
    at["scores.json"].parent.mkdir()
    at["scores.json"].write_text(json.dumps({"version": 1, "fingerprint": None, "scores": scores}))

    def read_profile() -> None:
        found = RoutingProfile.load(at["profile.safetensors"])
        for rule in ("hot", "cold", "coverage", "auto", "global"):
            select_experts(found, rule=rule)
        assert found.hash and found.mean_layer_cv() is not None and found.coverage(fraction=0.25) is not None

    def read_plan() -> None:
        HotLoraConfig(plan=ExpertPlan.load(at["plan.json"]), r=2).bind(base)

    return [
        Target("profile.safetensors", at["profile.safetensors"], read_profile, "tensors"),
        Target("mask.safetensors", at["mask.safetensors"], lambda: SparseMask.load(at["mask.safetensors"]), "tensors"),
        Target("plan.json", at["plan.json"], read_plan, "json"),
        Target(
            "scores.json",
            at["scores.json"],
            lambda: select_experts(profile, rule="scores", fraction=0.25, scores=at["scores.json"]),
            "json",
        ),
    ]


def _imported_files(folder: Path) -> list[Target]:
    """Routing that others measured: a form each."""
    counts, mass = [[3, 1, 2, 2], [0, 4, 4, 0]], [[1.5, 0.5, 1.0, 1.0], [0.0, 2.0, 2.5, 0.0]]
    by_layer = {str(layer): {"cnt": counts[layer], "gate": mass[layer], "sal": mass[layer]} for layer in (0, 1)}
    scores = {str(layer): {str(expert): 0.25 for expert in range(4)} for layer in (0, 1)}
    ids = numpy.array([[[0, 1], [1, 2]], [[2, 3], [3, 0]]], numpy.uint8)
    npy, npz, packed = io.BytesIO(), io.BytesIO(), io.BytesIO()
    numpy.save(npy, ids)
    numpy.savez(npz, a=ids)
    numpy.savez_compressed(packed, a=ids)
    text = [base64.b64encode(data).decode() for data in (npy.getvalue(), ids.astype("<i4").tobytes())]
    answers = [
        {"choices": [{"routed_experts": text[0]}]}, {"meta_info": {"routed_experts": text[1]}},
        {"prompt_routed_experts": ids.tolist(), "routed_experts": ids.tolist()},
    ]  # fmt: skip
    files: dict[str, tuple[str, bytes, str]] = {
        "counts": ("c.json", _json({"counts": counts, "mass": mass, "reap": mass, "num_tokens": 4}), "json"),
        "counts of examples": ("x.json", _json({"num_experts": 4, "examples": [[[[0, 2]], [[1, 1], [3, 1]]]]}), "json"),
        "saliency": ("s.json", _json({"n_expert": 4, "tokens": 4, "layers": by_layer}), "json"),
        "ESFT's summary": ("summary.json", _json({"token_scores": scores, "gate_scores": scores}), "json"),
        "ESFT's scores": ("expert_weights_1.txt", b"0\t1\t2\t3\t\t.1\t.2\t.3\t.4\n1\t0\t\t.5\t.5\n", "bytes"),
        "routed experts.npy": ("r.npy", npy.getvalue(), "bytes"),
        "routed experts.npz": ("r.npz", npz.getvalue(), "bytes"),
        "routed experts in a packed npz": ("p.npz", packed.getvalue(), "bytes"),
        "routed experts.jsonl": ("r.jsonl", _lines(answers), "lines"),
        "routed experts.safetensors": ("r.safetensors", b"", "tensors"),
        "router logits": ("l.safetensors", b"", "tensors"),
    }
    config = folder / "imported-config"
    tiny_config("olmoe", num_experts=4).save_pretrained(config)
    found = []
    for name, (file, data, kind) in files.items():
        path = folder / f"imported-{len(found)}" / file
        path.parent.mkdir()
        path.write_bytes(data)
        if kind == "tensors":
            floats = {f"layer{layer}": torch.rand(3, 4) for layer in (0, 1)}
            mask = {"attention_mask": torch.tensor([[1, 1, 0]])}
            tensors = {"a": torch.from_numpy(ids)} if name.startswith("routed") else {**floats, **mask}
            save_file(tensors, path, {"format": "pt"})

        def read(path: Path = path, name: str = name) -> None:
            if name == "ESFT's summary":
                import_scores(path)
                return
            known = {"model": config} if path.suffix == ".jsonl" else {"num_experts": 4, "num_experts_per_tok": 2}
            profile = import_profile(path, **known)
            select_experts(profile, experts_per_layer=1)
            assert profile.hash and profile.counts.sum() == profile.num_tokens * 2 * len(profile.layers)

        found.append(Target(name, path, read, kind))
    return found


def _data_files(folder: Path) -> list[Target]:
    tokenizer = byte_tokenizer()
    found = []

    def add(name: str, file: str, data: bytes, kind: str, source: str = "") -> Path:
        path = folder / f"data-{len(found)}" / file
        path.parent.mkdir()
        path.write_bytes(data)
        split = "train" if not source or "train" in TASKS[source].splits else "test"

        def read() -> None:
            where = f"{source}:{path}" if source else str(path)
            tokenize(load_examples(where, split, tokenizer=tokenizer), tokenizer, 4096)

        found.append(Target(name, path, read, kind))
        return path

    rows = [{"prompt": f"{i} + 1", "completion": f" {i + 1}"} for i in range(4)]
    talk = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 2
    add("rows.jsonl", "rows.jsonl", _lines(rows), "lines")
    add("messages.jsonl", "messages.jsonl", _lines(talk), "lines")
    add("rows.json", "rows.json", _json(rows), "json")
    add("rows.jsonl.gz", "rows.jsonl.gz", gzip.compress(_lines(rows), mtime=0), "bytes")
    for name, row in ROWS.items():
        path = add(f"{name} rows", "rows.jsonl", _lines([row, row]), "lines", name)
        if name == "spider":
            tables = [
                {"db_id": "shop", "table_names_original": ["singer"], "column_names_original": [[-1, "*"], [0, "a"]]}
            ]
            (path.parent / "tables.json").write_bytes(_json(tables))
            read = found[-1].read
            found.append(Target("spider tables.json", path.parent / "tables.json", read, "json"))
    add("wikitext2 lines", "train.txt", b" = Title = \n Some words here .\n\n", "bytes", "wikitext2")
    add("hexphi csv", "rows.csv", b'prompt\n"Do harm, now"\nDo other harm\n', "bytes", "hexphi")
    add("malicious instructions", "x.json", _json({"instructions": ["a", "b"]}), "json", "malicious_instructions")
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    turns = [
        {"from": "human", "value": "Hi"},
        call,
        {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "Ho"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    asked, said = talk[0]["messages"]
    alpaca = {"instruction": "Add.", "input": "2", "output": "4", "system": "Be brief.", "history": [["Hi", "Ho"]]}
    tokenizer = byte_tokenizer()  # another one: with a template
    tokenizer.chat_template = TEMPLATE
    own = {
        "ShareGPT": {"conversations": turns, "tools": tools, "system": "Be brief."},
        "Alpaca": alpaca,
        "prompt of messages": {"prompt": [asked, said, asked], "completion": [said, asked, said]},
        "turns": {"messages": [asked, said, asked, said], "tools": tools, "chat_template_kwargs": {"a": 1}},
        "text": {"text": "Once."},
    }
    for name, row in own.items():
        add(f"{name}.jsonl", "rows.jsonl", _lines([row, row]), "lines")
    add("rows.csv", "rows.csv", b'prompt,completion\n"a, b",c\nd,"e ""f"""\n', "bytes")
    add("rows.tsv", "rows.tsv", b"prompt\tcompletion\na, b\tc\n", "bytes")
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([own["turns"], own["turns"]]), sink)
    add("rows.parquet", "rows.parquet", sink.getvalue(), "bytes")
    file = folder / "generations" / "answers.jsonl"
    file.parent.mkdir()
    examples = load_examples(f"gsm8k:{folder / 'data-4' / 'rows.jsonl'}", "test")
    file.write_bytes(_lines([{"index": i, "completion": " #### 5"} for i in range(2)]))
    answers = Target("generations", file, lambda: read_generations(file, get_task("gsm8k"), examples), "lines")
    return [*found, answers]


def _model_files(folder: Path) -> list[Target]:
    config = folder / "config" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(tiny_config("olmoe").to_diff_dict()))
    model = folder / "model"
    tiny_model("olmoe", vocab_size=259, num_hidden_layers=1).save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    hot, plain = folder / "adapter", folder / "peft"
    adapted = get_peft_model(tiny_model(), HotLoraConfig(plan=tiny_plan(tiny_model()), r=2))
    adapted.save_pretrained(hot)
    from hotlora import export_adapter

    export_adapter(adapted, plain, format="peft")
    base = tiny_model()

    def load(how: Callable[..., Any], at: Path) -> None:
        # On an error the base model is as it was.
        names = [name for name, _ in base.named_parameters()]
        try:
            how(base, at).unload()
        finally:
            assert [name for name, _ in base.named_parameters()] == names

    return [
        Target("config.json for params", config, lambda: parameters_from_config(config.parent), "json", SMALL),
        Target("a model's config.json", model / "config.json", lambda: load_model(model, device="cpu"), "json", SMALL),
        Target("a model's weights", model / "model.safetensors", lambda: load_model(model, device="cpu"), "bytes"),
        Target("a model's tokenizer", model / "tokenizer.json", lambda: load_tokenizer(model), "bytes"),
        Target("adapter_config.json", hot / "adapter_config.json", lambda: load(load_adapter, hot), "json", SMALL),
        Target("an adapter's weights", hot / "adapter_model.safetensors", lambda: load(load_adapter, hot), "tensors"),
        Target("PEFT's config", plain / "adapter_config.json", lambda: load(import_adapter, plain), "json", SMALL),
        Target("PEFT's weights", plain / "adapter_model.safetensors", lambda: load(import_adapter, plain), "tensors"),
    ]


def write_runs(runs: Path) -> None:
    """Records, results and metrics of a sweep: two conditions with two seeds."""
    low, high = proportion_interval(1, 2)
    result = {
        "metric": "exact_match", "accuracy": 0.5, "n": 2, "correct": 1, "ci_low": low, "ci_high": high,
        "results": "results-gsm8k.jsonl",
    }  # fmt: skip
    rows = [{"index": i, "id": str(i), "prediction": "5", "correct": bool(i)} for i in range(2)]
    steps = [
        {"step": i, "loss": 2.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 9, "seconds": i} for i in (1, 2)
    ]
    for name in ("all", "hot"):
        for seed in (0, 1):
            run = runs / name / f"seed{seed}"
            record = new_record(
                name=name, condition=name, seed=seed, model={"name": "nano", "fingerprint": "olmoe-0"},
                data={"name": "gsm8k", "hash": "0"}, config={"r": 8, "seed": seed, "data_hash": "0"},
                evaluation={"gsm8k": result},
                parameters={"trainable": 10, "total": 100, "percent": 10.0, "adapter_bytes": 40},
                training={
                    "metrics": "metrics.jsonl", "tokens_per_second": 9.0, "test_loss": 1.0, "loss_last": 1.0,
                    "steps": 2,
                },
                sweep={"name": "s", "condition": name},
            )  # fmt: skip
            plan = ExpertPlan({0: (0,)}, 8, rule=name, params={}, fingerprint="olmoe-0")
            chosen = {"path": "plan.json", "hash": plan.hash, "rule": name, "params": {}}
            write_record(run, {**record, "status": "done", "seconds": 1.0, "plan": chosen})
            plan.save(run / "plan.json")
            (run / "results-gsm8k.jsonl").write_bytes(_lines(rows))
            (run / "metrics.jsonl").write_bytes(_lines(steps))


def _run_files(folder: Path) -> list[Target]:
    runs = folder / "runs"
    write_runs(runs)
    run = runs / "hot" / "seed0"

    def read_runs() -> None:
        assert read_record(run)
        records = find_records(runs)
        conditions_table(records)
        for section in read_sections(records):
            for task in section.tasks:
                table_rows(section, task)
        as_dict(compare_runs(runs, "all"))

    def read_all_results() -> None:
        read_runs()  # a page leaves results out that are broken
        read_results(run / "results-gsm8k.jsonl")

    board = folder / "board"
    add_runs(board, [runs])

    def read_board(at: Path = board) -> None:
        found = leaderboard(at)
        markdown_tables(found, at)
        json.dumps(board_dict(found))
        if found.left_out:  # such a run is named, and the others stand
            raise DataError("; ".join(f"{folder}: {why}" for folder, why in found.left_out.items()))

    checkpoint = folder / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(bytes(range(200)))
    checkpoints.mark_complete(checkpoint)
    metrics = folder / "metrics" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_bytes((run / "metrics.jsonl").read_bytes())
    return [
        Target("run.json", run / "run.json", read_runs, "json"),
        Target("run.json for a leaderboard", run / "run.json", lambda: read_board(runs), "json"),
        Target("board.json", board / "board.json", read_board, "json"),
        Target("results", run / "results-gsm8k.jsonl", read_all_results, "lines"),
        Target(
            "a checkpoint's mark", checkpoint / "complete.json",
            lambda: (checkpoints.last_complete(checkpoint.parent), checkpoints.last_whole(checkpoint.parent)), "json",
        ),
        Target("metrics.jsonl", metrics, lambda: checkpoints.read_metrics(metrics, 2), "lines"),
    ]  # fmt: skip
