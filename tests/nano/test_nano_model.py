"""What the embedded models must show, measured on held-out text of its three tasks."""

import itertools
import json

import pytest
import torch

from hotlora import jaccard, load_model, load_tokenizer, select_experts
from hotlora.hf.models import NANOS
from hotlora.runs.profiling import profile_data
from hotlora.tasks.data import load_examples

TASKS = ("nano-math", "nano-sql", "nano-choice")


@pytest.fixture(scope="module", params=NANOS)
def profiles(request):
    name = request.param
    model, tokenizer = load_model(name, device="cpu"), load_tokenizer(name)
    return {task: profile_data(model, tokenizer, load_examples(task, "test", limit=100), task, name) for task in TASKS}


@pytest.mark.parametrize(("name", "form"), zip(NANOS, ("olmoe", "qwen2_moe"), strict=True))
def test_it_is_small(name: str, form: str):
    model = load_model(name, device="cpu")
    assert model.config.model_type == form and model.num_parameters() <= 16_000_000
    assert model.dtype == torch.float32, "what is computed, whatever the file holds"
    files = [
        NANOS[name] / file for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json")
    ]
    assert sum(file.stat().st_size for file in files) <= 25_000_000


@pytest.mark.parametrize("task", TASKS)
def test_layers_are_skewed_and_the_whole_is_nearly_balanced(profiles, task: str):
    profile = profiles[task]
    assert profile.mean_layer_cv() >= 3 * profile.global_cv()
    assert profile.coverage(fraction=0.25).mean() > 0.5


def test_hot_sets_differ_between_tasks(profiles):
    plans = [select_experts(profile, fraction=0.25) for profile in profiles.values()]
    overlaps = [jaccard(a, b) for a, b in itertools.combinations(plans, 2)]
    assert sum(overlaps) / len(overlaps) < 0.6


@pytest.mark.parametrize("name", NANOS)
def test_numbers_have_one_spelling_and_text_comes_back(name: str):
    tokenizer = load_tokenizer(name)
    digits = {i: tokenizer.encode(str(i))[0] for i in range(10)}
    text = "Leo has 47 pens; SELECT count(*) FROM ship WHERE age > 90"
    ids = tokenizer.encode(text)
    assert [i for i in ids if i in digits.values()] == [digits[d] for d in (4, 7, 9, 0)]
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert told == "User: Hi\nAssistant:"
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == f"{told} Ho{tokenizer.eos_token}\n"


@pytest.mark.parametrize("name", NANOS)
def test_the_log_of_its_pretraining_is_kept(name: str):
    last = json.loads((NANOS[name] / "pretraining.jsonl").read_text().splitlines()[-1])
    assert last["step"] > 1000 and all(last["routing"][task]["ratio"] >= 3 for task in TASKS)
