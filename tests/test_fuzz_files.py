"""Every file format, broken at random: read, or refused with one message; never a traceback, never a changed file.

HOTLORA_FUZZ=500 gives each format so many inputs, drawn anew, in place of some that are always the same.
"""

import json
import os

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from hotlora.base.tensor_files import save_tensors

COUNT = int(os.environ.get("HOTLORA_FUZZ", "0"))
NAMES = (
    "profile.safetensors", "mask.safetensors", "plan.json", "scores.json", "rows.jsonl", "messages.jsonl", "rows.json",
    "rows.jsonl.gz", *(f"{name} rows" for name in fuzz.ROWS), "spider tables.json", "wikitext2 lines", "hexphi csv",
    "malicious instructions", "ShareGPT.jsonl", "Alpaca.jsonl", "prompt of messages.jsonl", "turns.jsonl", "text.jsonl",
    "rows.csv", "rows.tsv", "rows.parquet", "generations", "config.json for params", "a model's config.json",
    "a model's weights", "a model's tokenizer", "adapter_config.json", "an adapter's weights", "PEFT's config",
    "PEFT's weights", "run.json", "run.json for a leaderboard", "board.json",
    "results", "a checkpoint's mark", "metrics.jsonl", "counts", "counts of examples", "saliency", "ESFT's summary",
    "ESFT's scores", "routed experts.npy", "routed experts.npz", "routed experts in a packed npz",
    "routed experts.jsonl", "routed experts.safetensors", "router logits",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return {target.name: target for target in fuzz.targets(tmp_path_factory.mktemp("fuzz"))}


def test_every_target_is_named_and_whole(targets: dict[str, fuzz.Target]):
    assert tuple(sorted(targets)) == tuple(sorted(NAMES))
    for target in targets.values():
        assert fuzz.outcome(target, target.file.read_bytes()) == "read", target.name


def changed(**values: object):
    """A file's JSON, or the first of its lines, with other values."""

    def change(data: bytes) -> bytes:
        whole = json.loads(data.splitlines()[0] if b"}\n{" in data else data)
        return json.dumps({**whole, **values}).encode() + b"\n"

    return change


CONFIG = {"r": 8, "seed": 0, "data_hash": "0", "batch_size": 2, "gradient_accumulation_steps": 1}
# What was found: each was a traceback, or left the base model changed.
FOUND = (
    ("rows.json", lambda data: b"[" * 100_000),
    ("rows.jsonl", lambda data: b'{"prompt": ' + b"1" * 5000 + b"}"),
    ("plan.json", lambda data: b'{"version": ' + b"[" * 100_000),
    ("scores.json", lambda data: b"1" * 5000),
    ("malicious instructions", lambda data: b"[" * 100_000),
    ("spider tables.json", lambda data: b'[{"db_id": "shop"}]'),
    ("spider tables.json", lambda data: data.replace(b'[-1, "*"]', b"[-1]")),
    ("spider tables.json", lambda data: data.replace(b"[-1, ", b'["", ')),
    ("config.json for params", changed(attention_bias=None)),
    ("a model's config.json", lambda data: b"null"),
    ("a model's config.json", lambda data: b"[" * 100_000),
    ("a model's config.json", changed(max_position_embeddings={})),
    ("a model's tokenizer", lambda data: data.replace(b",", b";", 1)),
    ("a model's tokenizer", lambda data: b"[" * 100_000),
    ("adapter_config.json", changed(rank_pattern=0.5)),
    ("adapter_config.json", changed(trainable_token_indices={})),
    ("adapter_config.json", changed(a_seed=[])),
    ("adapter_config.json", changed(megatron_config={"a": 1})),
    ("PEFT's config", changed(target_parameters=[[]])),
    ("PEFT's config", changed(alpha_pattern={"experts": {}})),
    ("run.json", changed(config={"test_hash": []})),
    ("run.json", changed(config={"sampling": "greedy"})),
    ("run.json", changed(config={"train_on": ["all"]})),
    ("run.json", changed(config={"harness": 7, "num_fewshot": "many"})),
    ("run.json", changed(sweep={"name": "s", "condition": "a", "model": []})),
    ("run.json", changed(parameters={"trainable": 1, "total": 2, "adapter_bytes": {}})),
    ("run.json", changed(seconds=10**400)),
    ("run.json for a leaderboard", changed(config={**CONFIG, "processes": None})),
    ("run.json for a leaderboard", changed(config={**CONFIG, "batch_size": 2.5})),
    ("board.json", changed(protocols={"gsm8k olmoe-0": []})),
    ("results", changed(correct={})),
    ("results", changed(correct=[True])),
    ("metrics.jsonl", changed(step="1")),
)


@pytest.mark.parametrize("number", range(len(FOUND)))
def test_what_was_found_is_refused(targets: dict[str, fuzz.Target], number: int):
    name, change = FOUND[number]
    data = change(targets[name].file.read_bytes())
    assert data != targets[name].file.read_bytes() and fuzz.outcome(targets[name], data) == "refused", name


def beside(target: fuzz.Target, write) -> bytes:
    """What `write` writes to a file beside a target's."""
    path = target.file.with_name("other.safetensors")
    write(path)
    data = path.read_bytes()
    path.unlink()
    return data


def test_a_profile_with_the_right_hash_and_no_source_is_refused(targets: dict[str, fuzz.Target]):
    tensors = {"counts": torch.ones(2, 8, dtype=torch.int64), "mass": torch.ones(2, 8)}
    for source, outcome in (({}, "read"), (None, "refused")):
        meta = {"layers": [0, 1], "num_tokens": 8, "num_experts_per_tok": 2, "source": source}
        target = targets["profile.safetensors"]
        data = beside(target, lambda path: save_tensors(path, tensors, meta, format="hotlora.profile", version="1"))  # noqa: B023
        assert fuzz.outcome(target, data) == outcome


def test_weights_of_pefts_that_do_not_fit_leave_the_base_as_it_was(targets: dict[str, fuzz.Target]):
    target = targets["PEFT's weights"]
    tensors = load_file(target.file)
    name = next(name for name in tensors if "o_proj.lora_B" in name)
    for value in (tensors[name][:0].clone(), tensors[name][:3].clone(), tensors[name].to(torch.uint8)):
        data = beside(target, lambda path: save_file({**tensors, name: value}, path, {"format": "pt"}))  # noqa: B023
        assert fuzz.outcome(target, data) == "refused"


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_file_is_read_or_refused(targets: dict[str, fuzz.Target], name: str):
    target, found = targets[name], {"read": 0, "refused": 0}

    @settings(
        max_examples=COUNT or 10, deadline=None, derandomize=not COUNT, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(target.inputs())
    def check(data: bytes) -> None:
        found[fuzz.outcome(target, data)] += 1

    check()
    never = name == "a checkpoint's mark"  # a checkpoint with a broken one is left out
    assert bool(found["refused"]) != never, "nothing was refused: are the inputs broken at all?"
