"""Answers in batches, drawn and greedy; and evaluations that were stopped and go on."""

import copy
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from runs import run_evaluation, run_training
from tiny import fill, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GenerationConfig, PreTrainedTokenizerFast
from zoo import zoo_model

from hotlora import HotLoraConfig
from hotlora.base.errors import FileError, HotLoraError
from hotlora.base.records import read_record
from hotlora.cli import main as cli
from hotlora.evaluation.generate import GREEDY, Sampling, _by_tokens, _Draw, answer_batches, end_ids
from hotlora.evaluation.score import evaluate_task
from hotlora.tasks import Example, Task, get_task
from hotlora.training.config import TrainConfig

TOKENIZER = byte_tokenizer()
EXAMPLES = [Example("q" * (1 + 5 * i % 17) + str(i), f" answer {i}") for i in range(11)]
ECHO = Task("echo", "generate", "exact_match", lambda *_: [], lambda e, text: len(text) % 2 == 0, max_new_tokens=6)
SHORT_AND_LONG = [Example(letter * length, "") for letter, length in zip("abcd", (5, 9, 2, 5), strict=True)]
HOT = Sampling(samples=3, temperature=1.0, top_p=0.9, seed=5)


@pytest.fixture(scope="module")
def model():
    return tiny_model("olmoe", vocab_size=259, max_position_embeddings=256)


def texts(model, examples=EXAMPLES, *, sampling=GREEDY, **options) -> dict[tuple[str, int], str]:
    batches = answer_batches(model, TOKENIZER, examples, max_new_tokens=6, sampling=sampling, **options)
    return {(examples[a.index].prompt, a.sample): a.text for batch in batches for a in batch}


def test_batches_hold_as_many_tokens_as_the_longest(model):
    lengths = [100, 60, 50, 50, 25, 20, 10]
    rows = [(i, 0) for i in range(7)]
    sizes = [len(batch) for batch in _by_tokens(rows, lengths, 1)]
    assert sizes == [1, 1, 2, 3] and sum(sizes) == 7
    for batch_size in (1, 2, 3, 50):
        batches = list(_by_tokens(rows, lengths, batch_size))
        assert [row for batch in batches for row in batch] == rows
        assert all(len(batch) * lengths[batch[0][0]] <= batch_size * 100 for batch in batches)
        assert len(batches[0]) == min(batch_size, 7)


@pytest.mark.parametrize("family", ["deepseek_v4", "olmoe", "nemotron_h"])
def test_an_answer_does_not_depend_on_the_prompts_beside_it(family: str):
    """deepseek_v4 compresses windows that begin at a row's first column: a pad on the left shifts them."""
    model = zoo_model(family, vocab_size=259)
    alone: dict[tuple[str, int], str] = {}
    for example in SHORT_AND_LONG:
        alone |= texts(model, [example])
    batches = list(answer_batches(model, TOKENIZER, SHORT_AND_LONG, max_new_tokens=6, batch_size=8))
    assert {(SHORT_AND_LONG[a.index].prompt, 0): a.text for batch in batches for a in batch} == alone
    assert [len(batch) for batch in batches] == ([1, 2, 1] if family == "deepseek_v4" else [4])


def test_what_is_done_changes_no_batch_where_padding_matters():
    model = zoo_model("deepseek_v4", vocab_size=259)
    options: dict[str, Any] = {"max_new_tokens": 6, "batch_size": 4}
    batches = list(answer_batches(model, TOKENIZER, SHORT_AND_LONG, **options))
    done = {answer.index for batch in batches[:2] for answer in batch}
    assert list(answer_batches(model, TOKENIZER, SHORT_AND_LONG, done=done, **options)) == batches[2:]


def test_an_answer_keeps_its_first_space():
    """Llama's and Mixtral's tokenizers drop a text's first space, which is code's indentation."""
    words = ["<unk>", "<s>", "</s>", "\n", "▁", *"abdefntux:"]
    spelled = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    spelled.normalizer = normalizers.Replace(" ", "▁")
    spelled.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    model = tiny_model(vocab_size=len(words), max_position_embeddings=64)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # then every token is as likely, and the prompt alone decides what is drawn
    examples = [Example(f"def {name}:\n", "") for name in ("a", "ab", "abd", "b", "bd", "x", "u", "t", "n", "nt")]
    sampling = Sampling(samples=40, temperature=1.0, seed=1)
    drawn = [
        (examples[answer.index], answer.text)
        for batch in answer_batches(model, tokenizer, examples, max_new_tokens=4, sampling=sampling)
        for answer in batch
    ]
    for example, text in drawn:
        ids = tokenizer(example.prompt + text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == example.prompt + text
    begun = sum(text.startswith(" ") for _, text in drawn)
    assert begun > len(drawn) / 30  # one in 15 words is a space; two in a row are one in 225


def test_a_sample_is_the_same_whatever_else_is_answered(model):
    whole = texts(model, sampling=HOT)
    assert len(whole) == 33 and len({whole[EXAMPLES[3].prompt, s] for s in range(3)}) > 1
    assert texts(model, sampling=HOT, batch_size=2) == whole
    assert texts(model, EXAMPLES[::-2], sampling=HOT).items() <= whole.items()
    more = texts(model, sampling=Sampling(samples=5, temperature=1.0, top_p=0.9, seed=5))
    assert whole.items() < more.items()
    assert texts(model, sampling=Sampling(samples=3, temperature=1.0, top_p=0.9, seed=6)) != whole


# What a checkpoint's generation_config.json may say, field by field, each away from its default.
SAID = {
    "max_length": 3, "max_new_tokens": 1, "min_length": 300, "min_new_tokens": 300, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["e", "a", "\\u0120"], "do_sample": True, "num_beams": 3, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"nbits": 2}, "max_cache_len": 7,
    "temperature": 5.0, "top_k": 2, "top_p": 0.5, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5, "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "length_penalty": 9.0,
    "no_repeat_ngram_size": 1, "bad_words_ids": [[i] for i in range(3, 250)], "renormalize_logits": True,
    "forced_bos_token_id": 9, "forced_eos_token_id": 9, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 99.0), "suppress_tokens": list(range(3, 250)),
    "begin_suppress_tokens": list(range(3, 250)), "sequence_bias": [[[9], 99.0]], "token_healing": True,
    "guidance_scale": 3.0, "watermarking_config": {"bias": 99.0, "greenlist_ratio": 0.1}, "num_return_sequences": 2,
    "output_attentions": True, "output_hidden_states": True, "output_scores": True, "output_logits": True,
    "return_dict_in_generate": True, "encoder_no_repeat_ngram_size": 1, "is_assistant": True,
    "num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic", "assistant_confidence_threshold": 0.1,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "assistant_early_exit": 1, "assistant_lookbehind": 1,
    "target_lookbehind": 1, "assistant_ensemble_weight": 0.5, "speculation_type": "x", "compile_config": {"mode": "x"},
    "disable_compile": True, "continuous_batching_config": {"x": 1}, "low_memory": True, "penalty_alpha": 0.9,
    "dola_layers": "low", "diversity_penalty": 9.0, "num_beam_groups": 3, "constraints": [9],
    "force_words_ids": [[9]], "prefill_chunk_size": 2, "a_field_of_its_own": 1,
}  # fmt: skip
IDS = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}  # these are the file's to say


@pytest.mark.parametrize(
    ("adapted", "sampling", "names"),
    [
        (False, GREEDY, list(SAID)),
        (True, GREEDY, ["no_repeat_ngram_size", "num_beams"]),
        (False, HOT, ["bad_words_ids", "max_time"]),
    ],
    ids=["greedy", "adapted", "sampled"],
)
def test_answers_do_not_depend_on_the_checkpoints_generation_config(
    adapted: bool, sampling: Sampling, names: list[str]
):
    """Every field of transformers' GenerationConfig. A new one fails until it is listed."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert not fields - set(SAID) - IDS, "transformers has new fields: list them, away from their defaults"
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=256)
    model = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4)) if adapted else base
    plain = base.generation_config
    expected = texts(model, EXAMPLES[3:5], sampling=sampling)
    wrong = []
    for name in names:
        said = copy.deepcopy(plain)
        setattr(said, name, SAID[name])
        base.generation_config = said
        try:
            same = texts(model, EXAMPLES[3:5], sampling=sampling) == expected
        except Exception as error:
            same, name = False, f"{name}: {error!r:.60}"
        assert model.generation_config is base.generation_config is said, "the model's own comes back"
        if not same:
            wrong.append(name)
    assert not wrong
    said.eos_token_id = [TOKENIZER("q")["input_ids"][0], 1]  # the ids that end a text count
    base.generation_config = said
    assert end_ids(model, TOKENIZER) == sorted([1, said.eos_token_id[0]])


def test_a_low_temperature_or_a_small_top_p_is_greedy(model):
    greedy = texts(model)
    for sampling in (Sampling(temperature=1e-4), Sampling(temperature=1.0, top_p=1e-9)):
        assert texts(model, sampling=sampling) == greedy


def test_draws_have_the_models_probabilities():
    """Chi-squared of 20,000 draws; and never a token of no probability, at either end of the unit interval."""
    from scipy.stats import chi2

    n = 20_000
    logits = torch.tensor([-torch.inf, 1.0, 0.0, -torch.inf, 2.0, -1.0, -torch.inf]).expand(n, -1)
    draw = _Draw(range(n), prompt_width=3, max_new_tokens=2)
    drawn = draw(torch.zeros(n, 4, dtype=torch.long), logits).argmax(1)
    counts = torch.bincount(drawn, minlength=7)
    expected = logits[0].softmax(0) * n
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    statistic = ((counts - expected).square() / expected)[kept].sum()
    assert chi2.sf(statistic, int(kept.sum()) - 1) > 1e-4
    draw.uniform = torch.tensor([[0.0], [1.0 - 2**-24], [1.0]])
    ends = draw(torch.zeros(3, 3, dtype=torch.long), logits[:3]).argmax(1)
    assert ends.tolist() == [1, 5, 5]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"samples": 0}, "samples = 0 is out of range"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf.*finite"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
        ({"samples": 2}, "are all the same: give a temperature above 0"),
        ({"top_p": 0.5}, "are all the same"),
    ],
)
def test_sampling_out_of_range(options: dict, error: str):
    with pytest.raises(HotLoraError, match=error):
        Sampling(**options)


def test_several_samples_give_pass_at_k(model):
    sampling = Sampling(samples=5, temperature=1.0)
    evaluation = evaluate_task(model, TOKENIZER, ECHO, EXAMPLES, sampling=sampling)
    drawn = texts(model, sampling=sampling)
    for example, result in zip(EXAMPLES, evaluation.results, strict=True):
        assert result["predictions"] == [drawn[example.prompt, s] for s in range(5)]
        assert result["passed"] == [len(text) % 2 == 0 for text in result["predictions"]]
    assert set(evaluation.pass_at_k) == {1, 5}
    assert evaluation.pass_at_k[1] == pytest.approx(evaluation.accuracy)
    with pytest.raises(HotLoraError, match="boolq ranks choices, and nothing is drawn"):
        evaluate_task(model, TOKENIZER, get_task("boolq"), EXAMPLES, sampling=sampling)


CHOICES = [Example("p" * (2 + i % 4), "", choices=("no", "yes, " * (1 + i % 3)), label=0) for i in range(9)]


@pytest.mark.parametrize(
    ("task", "examples", "sampling"),
    [(ECHO, EXAMPLES, GREEDY), (ECHO, EXAMPLES, HOT), (get_task("boolq"), CHOICES, GREEDY)],
    ids=["greedy", "sampled", "choices"],
)
def test_an_evaluation_goes_on_from_any_place(model, tmp_path: Path, task: Task, examples: list[Example], sampling):
    def run(file: Path | None):
        return evaluate_task(model, TOKENIZER, task, examples, batch_size=2, sampling=sampling, results=file)

    whole = run(tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == len(examples) and run(None).results == whole.results
    whole.write_results(tmp_path / "final.jsonl")
    assert sorted(lines) == sorted((tmp_path / "final.jsonl").read_bytes().splitlines(keepends=True))
    work = []  # calls of the model, by what was kept
    for kept in range(len(lines) + 1):
        file = tmp_path / f"{kept}.jsonl"
        torn = lines[kept][:-1] if kept < len(lines) else '{"index": 0, "prediction": "é'.encode()[:-1]
        file.write_bytes(b"".join(lines[:kept]) + torn)  # also inside of a letter
        calls: list[int] = []
        handle = model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        again = run(file)
        handle.remove()
        assert again.results == whole.results and sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
        again.write_results(file)
        assert file.read_bytes() == (tmp_path / "final.jsonl").read_bytes()
        work.append(len(calls))
    assert work == sorted(work, reverse=True) and work[0] > work[len(lines) // 2] > work[-1] == 0


def test_results_of_others_are_not_gone_on_with(model, tmp_path: Path):
    file = tmp_path / "r.jsonl"
    evaluate_task(model, TOKENIZER, ECHO, EXAMPLES, results=file)
    for other in (EXAMPLES[1:], EXAMPLES[:4]):
        with pytest.raises(FileError, match=r"r\.jsonl holds results of other examples"):
            evaluate_task(model, TOKENIZER, ECHO, other, results=file)
    file.write_text('{"index": 0}\n')
    with pytest.raises(FileError, match=r"r\.jsonl, line 1"):
        evaluate_task(model, TOKENIZER, ECHO, EXAMPLES, results=file)


KILLED = """
import os, signal, sys
from pathlib import Path
import hotlora.evaluation.score
from hotlora.evaluation.generate import Sampling
from hotlora.runs.evaluation import run_evaluation
from hotlora.runs.options import EvalOptions

judge, left = hotlora.evaluation.score.judge, [int(sys.argv[3])]

def dying(*args, **options):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return judge(*args, **options)

hotlora.evaluation.score.judge = dying
run_evaluation(EvalOptions(model=sys.argv[1], limit=9, batch_size=2), "nano-math", sys.argv[2],
               sampling=Sampling(samples=2, temperature=1.0))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path):
    model, out = tmp_path / "model", tmp_path / "run"
    tiny_model("olmoe", vocab_size=259, max_position_embeddings=512).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    options = {"limit": 9, "batch_size": 2, "sampling": Sampling(samples=2, temperature=1.0)}
    whole, _ = run_evaluation(str(model), "nano-math", tmp_path / "whole", **options)
    killed = subprocess.run([sys.executable, "-c", KILLED, model, out, "3"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    file = out / "results-nano-math.jsonl"
    begun = [json.loads(line)["index"] for line in file.read_text().splitlines()]
    assert 0 < len(begun) < 9 and read_record(out)["status"] == "running"
    with open(file, "a") as end:
        end.write('{"index": 3, "id"')  # as a kill in the middle of a line leaves it
    for other in ({"batch_size": 3}, {"sampling": Sampling(samples=2, temperature=0.5)}, {"limit": 8}):
        with pytest.raises(HotLoraError, match="holds another run"):
            run_evaluation(str(model), "nano-math", out, **{**options, **other})
    record, evaluation = run_evaluation(str(model), "nano-math", out, **options)
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()
    seconds = {"seconds": 0}
    assert record["evaluation"]["nano-math"] | seconds == whole["evaluation"]["nano-math"] | seconds
    assert evaluation is not None and record["status"] == "done"
    # Done: the size of a batch is no matter any more.
    assert run_evaluation(str(model), "nano-math", out, **{**options, "batch_size": 5}) == (record, None)
    # Results without a record are of nobody knows what.
    (out / "run.json").unlink()
    file.write_text('{"index": 0, "id": "x", "correct": true}\n')
    assert run_evaluation(str(model), "nano-math", out, **options)[1] is not None
    assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A model's folder and an adapter's that changes what it says."""
    folder = tmp_path_factory.mktemp("saved")
    base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=512)
    base.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    adapted = peft.get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=4))
    fill(adapted, seed=1, scale=0.5)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return str(folder / "model"), folder / "adapter"


def test_an_adapter_that_was_moved_is_the_same_and_one_with_another_scale_is_not(
    saved: tuple[str, Path], tmp_path: Path
):
    model, adapter = saved
    first = run_evaluation(model, "nano-math", tmp_path / "out", adapter=adapter, limit=3)[0]
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    assert run_evaluation(model, "nano-math", tmp_path / "out", adapter=moved, limit=3) == (first, None)
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 3 * config["lora_alpha"]}))
    with pytest.raises(HotLoraError, match="the adapter's config is not what it was"):
        run_evaluation(model, "nano-math", tmp_path / "out", adapter=moved, limit=3)


def test_merged_for_the_evaluation_says_the_same(saved: tuple[str, Path], tmp_path: Path):
    model, adapter = saved
    options = {"adapter": adapter, "limit": 3}
    apart, _ = run_evaluation(model, "nano-math", tmp_path / "apart", **options)
    merged, _ = run_evaluation(model, "nano-math", tmp_path / "merged", merge=True, **options)
    run_evaluation(model, "nano-math", tmp_path / "base", limit=3)
    files = [(tmp_path / name / "results-nano-math.jsonl").read_text() for name in ("apart", "merged", "base")]
    assert files[0] == files[1] != files[2]
    assert merged["config"].pop("merge") is True and "merge" not in apart["config"]
    assert merged["config"] == apart["config"] and merged["parameters"] == apart["parameters"]
    with pytest.raises(HotLoraError, match="--merge on against none"):
        run_evaluation(model, "nano-math", tmp_path / "apart", merge=True, **options)


def test_options_that_do_not_go_together(saved: tuple[str, Path]):
    model, adapter = saved
    for data, options, error in (
        ("nano-math", {"merge": True}, "there is no adapter to merge"),
        ("nano-math", {"merge": True, "adapter": adapter, "quantize": 8}, "cannot be merged into experts in 8 bits"),
        ("nano-math", {"on_top_of": [adapter], "quantize": 8}, "cannot be merged into experts in 8 bits"),
        ("nano-math", {"adapter": adapter, "keep_hot": True}, "keep_hot is for .*: give adapter and quantize"),
        ("nano-math", {"quantize": 4, "keep_hot": True}, "keep_hot is for .*: give adapter and quantize"),
        ("nano-math", {"quantize": 3}, "bits=3 must be 4 or 8"),
        ("nano-math", {"engine": "llama"}, "engine 'llama' does not exist: choose one of transformers, vllm"),
        ("nano-choice", {"engine": "vllm"}, "nano-choice ranks choices, which the engine vllm is not used for"),
        ("nano-math", {"engine": "vllm", "quantize": 8}, "the engine vllm has no experts in 8 bits.*--quantize 0"),
        ("nano-math", {"engine": "vllm", "on_top_of": [adapter]}, "the engine vllm takes no on_top_of"),
    ):
        with pytest.raises(HotLoraError, match=error):
            run_evaluation(model, data, **options)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_without_vllm_the_error_names_the_mend():
    with pytest.raises(HotLoraError, match=r"engine vllm cannot be used .*: pip install vllm, which needs a GPU"):
        run_evaluation("nano", "nano-math", engine="vllm")


def test_a_run_on_requests_to_refuse(saved: tuple[str, Path], tmp_path: Path):
    """They have no answer, so no loss is taken of them; their rate is."""
    rows = [{"instruction": f"Name cake {i}.", "input": "", "output": f"Cake {i}."} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "requests.csv").write_text("Hide the cake\nEat the cake\n")
    record = run_training(
        saved[0], f"saferpaca:{tmp_path}/rows.json", tmp_path / "run", test_data=f"advbench:{tmp_path}/requests.csv",
        config=TrainConfig(max_steps=1, batch_size=4, r=4, max_length=256),
    )  # fmt: skip
    assert record["evaluation"]["advbench"]["metric"] == "refusal_rate" and record["evaluation"]["advbench"]["n"] == 2
    assert "test_loss" not in record["training"] and record["training"]["loss_last"] > 0


def test_the_command_draws_samples(saved: tuple[str, Path], monkeypatch, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", "--model", saved[0], "--data", "nano-math", "--limit", "2", "--json"]
    for more, found in ((["--samples", "5", "--temperature", "0.8"], "pass@5"), (["--samples", "5"], "all the same")):
        monkeypatch.setattr(sys, "argv", ["hotlora", *words, *more])
        with pytest.raises(SystemExit):
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        assert found in captured.out + captured.err
