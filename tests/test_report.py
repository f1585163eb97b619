"""The page and the tables, from synthetic run records."""

import html
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from rich.console import Console

from hotlora.base.errors import DataError, FileError
from hotlora.base.records import find_records, new_record, write_record
from hotlora.report.measured import apart
from hotlora.report.page import conditions_table, write_report
from hotlora.report.rows import table_rows
from hotlora.report.sections import read_sections
from hotlora.report.tables import section_tables
from hotlora.report.text import human_bytes, human_count, human_seconds
from hotlora.routing.plan import select_experts
from hotlora.routing.profile import RoutingProfile

MODEL = {"name": "nano", "fingerprint": "olmoe-3f2a91c0b4d7", "num_parameters": 5_663_872}
ACCURACY = {"base": 0.08, "all": 0.62, "hot": 0.605, "random": 0.54, "cold": 0.465}
TRAINABLE = {"base": 0, "all": 1_327_104, "hot": 417_792, "random": 417_792, "cold": 417_792}


def make_profile(num_layers=6, num_experts=32, top_k=4, tokens=50_000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    skew = torch.linspace(0.5, 1.1, num_layers)[:, None]
    shares = (torch.randn(num_layers, num_experts, generator=generator) * skew).softmax(dim=1)
    counts = (shares * tokens * top_k).round().long()
    counts[:, 0] += tokens * top_k - counts.sum(dim=1)
    return RoutingProfile(tuple(range(num_layers)), counts, counts * 0.2, tokens, top_k)


def write_runs(folder, data="nano-math", conditions=tuple(ACCURACY), seed=0, profile=None, n=200):
    """A profile and one run a condition, as training and evaluation leave them."""
    profile = profile or make_profile()
    profile.save(folder / data)
    rng = np.random.default_rng(seed)
    difficulty = rng.random(n)
    for condition in conditions:
        name = condition if condition in ("base", "all") else f"{condition} 25%"
        run = folder / data / f"{condition}-{seed}"
        correct = difficulty < np.clip(ACCURACY[condition] + rng.normal(0, 0.08, n), 0, 1)
        sections = {}
        if condition != "base":
            plan = select_experts(profile, rule=condition)
            plan.save(run)
            sections["profile"] = {"path": "../profile.safetensors", "hash": profile.hash}
            sections["plan"] = {"path": "plan.json", "rule": condition, "params": plan.params}
            loss = 0.35 + 2.0 * np.exp(-np.arange(60) / 14) + rng.normal(0, 0.05, 60)
            loss += {"all": 0, "hot": 0.01, "random": 0.05, "cold": 0.1}[condition]
            rows = [{"step": i + 1, "loss": float(x), "learning_rate": 4e-4} for i, x in enumerate(loss)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            sections["training"] = {
                "steps": 60, "loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"], "tokens": 181_000,
                "seconds": 93.1, "tokens_per_second": 3012.4 if condition == "all" else 4210.7,
                "peak_memory_bytes": 912_000_000, "metrics": "metrics.jsonl",
            }  # fmt: skip
        trainable = TRAINABLE[condition]
        results = [{"index": i, "id": f"{i:x}", "correct": bool(right)} for i, right in enumerate(correct)]
        run.mkdir(parents=True, exist_ok=True)
        (run / f"results-{data}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
        record = new_record(
            name=name, condition=condition, seed=seed, model=MODEL,
            data={"name": data, "train": 2000, "test": n},
            config={"r": 8, "lora_alpha": 16, "learning_rate": 4e-4, "batch_size": 16, "max_steps": 60},
            parameters={
                "trainable": trainable, "total": 5_663_872 + trainable, "adapter_bytes": 4 * trainable,
                "percent": 100 * trainable / (5_663_872 + trainable),
            },
            evaluation={data: {
                "metric": "exact_match", "accuracy": float(correct.mean()),
                "n": n, "correct": int(correct.sum()), "results": f"results-{data}.jsonl", "seconds": 9.1,
            }},
            **sections,
        )  # fmt: skip
        write_record(run, record | {"status": "done", "seconds": 104.2})


class Page(HTMLParser):
    """Tags that are open, the table's cells, and every address that the page points to."""

    VOID = ("meta", "img", "br", "hr", "link")

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.addresses, self.images = [], [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.addresses += [attributes[key] for key in ("src", "href", "srcset") if key in attributes]
        self.images += tag == "img"
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder)
    return folder


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    return write_report(runs, tmp_path_factory.mktemp("out") / "page")


def test_the_page_is_whole_and_self_contained(report):
    text = report.read_text()
    page = Page(text)
    assert report.name == "report.html" and page.open == []
    assert page.images == 4
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", text)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    pictures = sorted(path.name for path in report.parent.glob("*.png"))
    assert pictures == [f"nano-nano-math-{name}.png" for name in ("coverage", "heat-map", "load", "loss")]
    for picture in report.parent.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(list(report.parent.iterdir())) == 5


def test_numbers_are_the_records(report, runs):
    rows = {row[0]: row[1:] for row in Page(report.read_text()).rows}
    assert list(rows)[1:] == ["base", "all", "hot 25%", "random 25%", "cold 25%"]
    profile = RoutingProfile.load(runs / "nano-math")
    for record in find_records(runs).values():
        accuracy, difference, rate, covered, trained, adapter, speed, memory = rows[record["name"]]
        result = record["evaluation"]["nano-math"]
        assert re.fullmatch(rf"{100 * result['accuracy']:.1f} \[\d+\.\d–\d+\.\d\]", accuracy)
        if record["condition"] == "base":
            assert {rate, covered, trained, adapter, speed, memory} == {"–"}
            continue
        assert rate == "0.0004"
        assert speed == f"{record['training']['tokens_per_second']:,.0f}" and memory == "912.0 MB"
        assert trained.endswith(f" ({record['parameters']['percent']:.1f}%)")
        if record["condition"] == "all":
            assert (difference, covered, trained.split()[0], adapter) == ("–", "100.0%", "1.3M", "5.3 MB")
        else:
            assert re.fullmatch(r"[+−]\d+\.\d \[[+−]\d+\.\d to [+−]\d+\.\d\]", difference)
            assert (trained.split()[0], adapter) == ("417.8K", "1.7 MB")
        if record["condition"] == "hot":
            assert covered == f"{profile.coverage(fraction=0.25).mean():.1%}"


def test_the_same_runs_give_the_same_page(runs, report, tmp_path):
    again = write_report(runs, tmp_path)
    assert again.read_text().replace(str(tmp_path), "") == report.read_text().replace(str(report.parent), "")


def test_failed_unfinished_and_unevaluated_runs_are_shown(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    for name, change in (
        ("random", {"status": "failed", "error": "out of <memory>"}),
        ("cold", {"status": "running"}),
        ("mine", {"status": "done"}),
        ("ours", {"status": "failed", "error": "Stopped: stopped by Ctrl-C: run it again"}),
    ):
        record = new_record(name=name, condition=name, model=MODEL, data={"name": "nano-math"})
        write_record(tmp_path / name, record | change)
    names = [row[0] for row in Page(write_report(tmp_path, tmp_path / "out").read_text()).rows]
    assert names == [
        "run", "all", "hot 25%", "randomfailed: out of <memory>", "coldnot finished", "minenot evaluated",
        "oursstopped by Ctrl-C: run it again",
    ]  # fmt: skip


def test_files_that_are_gone_or_broken_are_noted(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    (tmp_path / "nano-math" / "profile.safetensors").unlink()
    (tmp_path / "nano-math" / "hot-0" / "results-nano-math.jsonl").unlink()
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "hot 25%: its profile ../profile.safetensors is gone." in text
    page = Page(text)
    assert page.images == 1  # the loss
    assert re.fullmatch(r"[+−]\d+\.\d", page.rows[2][2])  # a difference, but no interval
    (tmp_path / "nano-math" / "profile.safetensors").write_bytes(b"half")
    (tmp_path / "nano-math" / "hot-0" / "plan.json").write_text("{")
    (tmp_path / "nano-math" / "all-0" / "results-nano-math.jsonl").write_text('{"correct": 5}\n')
    (tmp_path / "nano-math" / "hot-0" / "results-nano-math.jsonl").write_text('{"correct": 1}\n')
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "hot 25%: its profile is left out" in text and "not a whole routing profile" in text
    assert "hot 25%: its plan is left out" in text and "all: its results are left out" in text
    assert Page(text).images == 1


def test_a_plan_for_another_model_is_left_out(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    select_experts(make_profile(num_experts=64)).save(tmp_path / "nano-math" / "all-0")
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "plan is left out: it is for 64 experts a layer, but the profile of nano has 32" in text
    rows = {row[0]: row[1:] for row in Page(text).rows}
    assert rows["all"][3] == "–" and rows["hot 25%"][3].endswith("%")


def change(run, **changes):
    file = run / "run.json"
    record = json.loads(file.read_text())
    for key, value in changes.items():
        section = record
        *path, last = key.split("__")
        for name in path:
            section = section[name]
        section[last] = value
    file.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"version": 1', "cut short"),
        ("[1]", "a JSON list"),
        ('{"name": "my-js-package"}', "has version None"),
        ("\x00", "another kind of file"),
    ],
)
def test_a_broken_or_foreign_record_is_a_footnote(tmp_path, content, says):
    write_runs(tmp_path, conditions=("all", "hot"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "run.json").write_text(content)
    text = html.unescape(write_report(tmp_path, tmp_path / "out").read_text())
    assert [row[0] for row in Page(text).rows] == ["run", "all", "hot 25%"]
    assert "Left out" in text and f"{tmp_path / 'theirs'}: " in text and says in text
    shutil.rmtree(tmp_path / "nano-math")
    with pytest.raises(DataError, match=rf"no run\.json in .* that can be read \(.*{says}"):
        write_report(tmp_path, tmp_path / "out")


def test_damaged_numbers_are_told_and_no_traceback(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot", "random", "cold"))
    folder = tmp_path / "nano-math"
    lines = ['{"step": 1, "loss": 2.0}', '{"step": 2, "loss": null}']
    (folder / "all-0" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": "2.0"}', ""]))
    (folder / "hot-0" / "metrics.jsonl").write_text("\n".join([*lines, f'{{"step": 3, "loss": {"9" * 400}}}', ""]))
    (folder / "random-0" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": [3], "loss": 1}', ""]))
    (folder / "cold-0" / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": -1e999}', ""]))
    change(folder / "hot-0", parameters__percent=None, seconds=None)
    change(folder / "cold-0", **{"evaluation__nano-math__ci_low": None, "training__peak_memory_bytes": None})
    text = html.unescape(write_report(tmp_path, tmp_path / "out").read_text())
    assert "all: its losses are left out" in text and "line 3: step '3' or loss '2.0' is no number" in text
    assert "random 25%: its losses are left out" in text and Page(text).images == 4
    hot = next(row for row in Page(text).rows if row[0] == "hot 25%")
    assert hot[5].endswith("(6.9%)"), "the share is worked out"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seconds": 1e400}, "seconds is inf"),
        ({"evaluation__nano-math__correct": 10**6}, "correct 1000000"),
        ({"evaluation__nano-math__accuracy": 17}, "accuracy 17"),
        ({"name": "\ud800"}, "half a character"),
        ({"seed": 10**400}, "seed has 401 digits"),
    ],
)
def test_a_record_of_impossible_numbers_is_a_footnote(tmp_path, changes, says):
    write_runs(tmp_path, conditions=("all", "hot"))
    change(tmp_path / "nano-math" / "hot-0", **changes)
    text = html.unescape(write_report(tmp_path, tmp_path / "out").read_text())
    assert says in text and [row[0] for row in Page(text).rows] == ["run", "all"]


def test_names_are_shown_as_they_are(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    for run, name in (("all-0", "$$"), ("hot-0", r"$\frac{1}$ & <b>")):
        change(tmp_path / "nano-math" / run, name=name, model__name="数据")
    write_runs(tmp_path, "nano-sql", ("all",))
    change(tmp_path / "nano-sql" / "all-0", model__name="模型", data__name="nano-math")
    page = Page(write_report(tmp_path, tmp_path / "out").read_text())
    assert {row[0] for row in page.rows} == {"run", "$$", r"$\frac{1}$ & <b>", "all"}
    assert page.images == len(list((tmp_path / "out").glob("*.png"))) == 8, "none replaces another"
    console = Console(width=84, file=io.StringIO())
    change(tmp_path / "nano-math" / "hot-0", name="a\x1b[31m\r\nb")
    console.print(conditions_table(find_records(tmp_path)))
    assert "\x1b" not in console.file.getvalue() and "a�[31m" in console.file.getvalue()


def test_a_held_out_loss_is_a_score_where_there_is_no_task(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    for run, loss in (("all-0", 1.25), ("hot-0", 1.2)):
        change(tmp_path / "nano-math" / run, evaluation=None, training__test_loss=loss)
    text = write_report(tmp_path, tmp_path / "out").read_text()
    rows = Page(text).rows
    assert rows[0][1:3] == ["held-out loss", "against all"]
    assert [row[:3] for row in rows[1:]] == [["all", "1.2500", "–"], ["hot 25%", "1.2000", "−0.0500"]]
    assert "has a held-out loss of 1.2000, and LoRA on all experts of 1.2500, with 31.5%" in text
    console = Console(width=84, file=io.StringIO())
    console.print(conditions_table(find_records(tmp_path)))
    assert "held-out loss" in console.file.getvalue() and "accuracy" not in console.file.getvalue()


def test_held_out_losses_of_different_rows_are_not_set_against_each_other(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    for run, loss, rows, config in (
        ("all-0", 1.25, 8, {"config__test_split": 0.1, "config__test_hash": "a" * 64}),
        ("hot-0", 1.2, 20, {"config__test_data": "folder/held.jsonl", "config__test_hash": "b" * 64}),
    ):
        change(
            tmp_path / "nano-math" / run, evaluation=None, training__test_loss=loss, data__test=rows, **config
        )  # fmt: skip
    text = write_report(tmp_path, tmp_path / "out").read_text()
    rows = Page(text).rows
    assert "against all" not in rows[0]
    place = rows[0].index("held-out rows")
    assert [row[place] for row in rows[1:]] == ["8 of test split 0.1", "20 of held.jsonl"]
    assert "losses of different rows say nothing about each other" in text and "has a held-out loss of" not in text
    console = Console(width=84, file=io.StringIO())
    console.print(conditions_table(find_records(tmp_path)))
    assert "different rows" in console.file.getvalue() and "−0.0500" not in console.file.getvalue()

    for run in ("all-0", "hot-0"):  # the same rows, named otherwise
        change(tmp_path / "nano-math" / run, config__test_hash="b" * 64)
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "different rows" not in text and "−0.0500" in text


def test_scores_of_other_protocols_are_marked_and_not_subtracted(tmp_path):
    """lm-eval's few-shot scores, drawn answers and vLLM's stand in the greedy table by their names alone."""
    write_runs(tmp_path, conditions=("base", "all", "hot"))
    for name, config in (
        ("harness", {"harness": "lm-eval 0.4.9", "num_fewshot": 5}),
        ("own", {"harness": "lm-eval 0.4.9", "num_fewshot": None}),
        ("drawn", {"sampling": {"samples": 20, "temperature": 0.2, "top_p": 0.95, "seed": 0}}),
        ("vllm", {"engine": "vllm", "max_new_tokens": 9}),
    ):
        shutil.copytree(tmp_path / "nano-math" / "base-0", tmp_path / "nano-math" / name)
        change(tmp_path / "nano-math" / name, config=config)
    (section,) = read_sections(find_records(tmp_path))
    shown = {row.name: row.cells["difference"] for row in table_rows(section, "nano-math")}
    for name in (
        "base (lm-eval 0.4.9, 5 few-shot examples)", "base (lm-eval 0.4.9, the task's own few-shot examples)",
        "base (20 samples, temperature 0.2, top_p 0.95)", "base (vllm, at most 9 tokens)",
    ):  # fmt: skip
        assert shown[name] == "–", name
    assert shown["base"] != "–" and shown["hot 25%"] != "–"
    text = html.unescape(write_report(tmp_path, tmp_path / "out").read_text())
    assert "exact match on 200 test examples; exact match on 200 test examples (20 samples, temperature 0.2" in text
    assert "exact match on 200 test examples (lm-eval 0.4.9, 5 few-shot examples)" in text


def give(run, correct, n=200, **changes):
    """A run's score, without its results; and other changes."""
    (run / "results-nano-math.jsonl").unlink(missing_ok=True)
    result = {"metric": "exact_match", "accuracy": correct / n, "n": n, "correct": correct}
    change(run, evaluation={"nano-math": result}, **changes)


def test_a_run_is_compared_with_all_experts_of_its_own_weights_and_data(tmp_path):
    """Two versions of a model behind one name: hot of the second is 2 points better than its own all, not 42."""
    for version, correct in (("v0", {"all": 80, "hot": 70}), ("v1", {"all": 160, "hot": 164})):
        write_runs(tmp_path / version, conditions=("all", "hot"))
        for name, right in correct.items():
            run = tmp_path / version / "nano-math" / f"{name}-0"
            data = {"config__data_hash": version * 32, "config__test_hash": "a" * 64, "data__hash": version * 32}
            give(run, right, model__fingerprint=version, **data)
    (section,) = read_sections(find_records(tmp_path))
    shown = [row.cells["difference"] for row in table_rows(section, "nano-math") if row.condition == "hot"]
    assert sorted(shown) == ["+2.0", "−5.0"] and section.notes == []


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model__fingerprint": "olmoe-0"}, "model"),
        ({"config__model_hash": "e" * 64}, "model"),  # of the same shapes
        ({"training__test_loss_before": 2.1}, "model"),
        ({"config__data_hash": "e" * 64}, "training data"),
        ({"config__test_hash": "e" * 64}, "test data"),
        ({"config__scorer_hash": "e" * 64}, "what judges the answers"),
    ],
    ids=str,
)
def test_where_no_run_on_all_experts_is_comparable_that_is_noted(tmp_path, changes, word):
    write_runs(tmp_path, conditions=("all", "hot"))
    known = {f"config__{name}_hash": "a" * 64 for name in ("data", "test", "scorer", "model")}
    known |= {"training__test_loss_before": 2.0}
    give(tmp_path / "nano-math" / "all-0", 80, **known)
    give(tmp_path / "nano-math" / "hot-0", 160, **(known | changes))
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "+40.0" not in text and "LoRA on the hot experts is right" not in text
    assert (
        f"hot 25%: no difference on nano-math to a run on all experts, for those are not comparable ({word})." in text
    )


def test_what_precision_and_what_was_trained_itself_change_is_no_other_model(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    known = {f"config__{name}_hash": "a" * 64 for name in ("data", "test", "model")}
    for run, loss in (("all-0", 2.0), ("hot-0", 2.02)):
        give(tmp_path / "nano-math" / run, 80, **known, training__test_loss_before=loss)
    records = find_records(tmp_path)
    hot, every = (records[tmp_path / "nano-math" / run] for run in ("hot-0", "all-0"))
    assert apart(hot, every, "nano-math") == []
    whole = {
        **hot,
        "sweep": {"name": "s", "condition": "fft", "model": "m"},
    }  # a fine-tuned model
    whole["config"] = hot["config"] | {"model_hash": "b" * 64}
    assert apart(whole, every, "nano-math") == []
    beneath = {**hot, "training": hot["training"] | {"test_loss_before": 1.0}}
    beneath["config"] = hot["config"] | {"on_top_of": ["c" * 64]}
    assert apart(beneath, every, "nano-math") == [], "an option"


@pytest.mark.parametrize("other", [{"config__learning_rate": 1.0}, {"config__test_hash": "e" * 64}], ids=str)
def test_the_summary_quotes_random_experts_at_the_hot_runs_options(tmp_path, other):
    """The one that comes last in the folder has another learning rate, or other test examples."""
    write_runs(tmp_path, conditions=("all", "hot", "random"))
    shutil.copytree(tmp_path / "nano-math" / "random-0", tmp_path / "nano-math" / "random-z")
    for name, correct in (("all-0", 120), ("hot-0", 100), ("random-0", 78), ("random-z", 2)):
        give(tmp_path / "nano-math" / name, correct, **{"config__test_hash": "a" * 64})
    change(tmp_path / "nano-math" / "random-z", **other)
    assert "With as many experts, 39.0% with random ones." in write_report(tmp_path, tmp_path / "out").read_text()
    shutil.rmtree(tmp_path / "nano-math" / "random-0")
    assert "With as many experts" not in write_report(tmp_path, tmp_path / "out").read_text()


def test_no_runs(tmp_path):
    with pytest.raises(DataError, match=r"no run\.json"):
        write_report(tmp_path, tmp_path / "out")
    with pytest.raises(FileError, match="not a folder"):
        write_report(tmp_path / "none", tmp_path / "out")


def test_one_section_a_task_and_base_joins_each(tmp_path):
    write_runs(tmp_path, "nano-math", ("all", "hot"))
    write_runs(tmp_path, "nano-sql", ("all", "hot"))
    result = {"metric": "exact_match", "accuracy": 0.1, "n": 10, "correct": 1}
    base = new_record(
        name="base", condition="base", model=MODEL, data={"name": "both"},
        evaluation={"nano-math": result, "nano-sql": result | {"accuracy": 0.2, "correct": 2}},
    )  # fmt: skip
    write_record(tmp_path / "base", base | {"status": "done"})
    sections = read_sections(find_records(tmp_path))
    assert [section.data for section in sections] == ["nano-math", "nano-sql"]
    assert [table_rows(s, s.data)[0].cells["accuracy"][:4] for s in sections] == ["10.0", "20.0"]
    page = Page(write_report(tmp_path, tmp_path / "out").read_text())
    assert page.images == 8 and len(list((tmp_path / "out").glob("*.png"))) == 8


def test_a_model_by_its_folder_from_the_root_is_the_same_model(tmp_path, monkeypatch):
    """An adapter notes it so, and what scores the adapter takes it from there."""
    write_runs(tmp_path, conditions=("base", "all", "hot"))
    for run, name in (("base", "bases/moe"), ("all", "bases/moe"), ("hot", f"{tmp_path}/bases/moe")):
        change(tmp_path / "nano-math" / f"{run}-0", model__name=name)
    monkeypatch.chdir(tmp_path)
    (section,) = read_sections(find_records(tmp_path))
    assert section.model == "bases/moe" and len(section.records) == 3


def test_several_seeds_are_told_apart_and_compared_within_a_seed(tmp_path):
    for seed in (0, 1):
        write_runs(tmp_path, conditions=("all", "hot"), seed=seed)
    (section,) = read_sections(find_records(tmp_path))
    rows = table_rows(section, "nano-math")
    assert [row.name for row in rows] == ["all, seed 0", "all, seed 1", "hot 25%, seed 0", "hot 25%, seed 1"]
    for row, reference in zip(rows[2:], rows[:2], strict=True):
        ours, theirs = (float(r.cells["accuracy"].split()[0]) for r in (row, reference))
        shown = float(row.cells["difference"].split()[0].replace("−", "-"))
        assert shown == pytest.approx(ours - theirs, abs=0.11)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    write_runs(tmp_path / "a", conditions=("all", "hot"))
    write_runs(tmp_path / "b", conditions=("hot",))
    shutil.move(tmp_path / "b" / "nano-math" / "hot-0", tmp_path / "a" / "nano-math" / "again")
    (section,) = read_sections(find_records(tmp_path / "a"))
    names = [row.name for row in table_rows(section, "nano-math")]
    assert sorted(names) == ["all", "hot 25% (nano-math/again)", "hot 25% (nano-math/hot-0)"]


def test_the_terminal_shows_the_same_rows(runs):
    table = conditions_table(find_records(runs))
    console = Console(width=84, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    assert "1.3M" in text and "hot 25%" in text and "…" not in text
    accuracy = next(iter(find_records(runs).values()))["evaluation"]["nano-math"]["accuracy"]
    assert f"{100 * accuracy:.1f} [" in text
    assert max(map(len, text.splitlines())) <= 84
    assert conditions_table({}).row_count == 0


def test_options_that_differ_and_the_learning_rate_are_columns(tmp_path):
    write_runs(tmp_path, conditions=("base", "all", "hot", "random"))
    change(tmp_path / "nano-math" / "hot-0", config__learning_rate=1e-3, config__quantize=4)
    change(tmp_path / "nano-math" / "random-0", config__save_steps=7, config__fraction=0.5)
    rows = Page(write_report(tmp_path, tmp_path / "out").read_text()).rows
    assert rows[0][:6] == ["run", "accuracy, %", "against all, points", "learning rate", "quantize", "routing covered"]
    assert {row[0]: row[3:5] for row in rows[1:]} == {
        "base": ["–", "–"], "all": ["0.0004", "none"], "hot 25%": ["0.001", "4"], "random 25%": ["0.0004", "none"],
    }  # fmt: skip


def test_the_held_out_loss_stands_beside_a_score(tmp_path):
    write_runs(tmp_path, conditions=("all", "hot"))
    change(tmp_path / "nano-math" / "hot-0", training__test_loss=1.23456)
    rows = Page(write_report(tmp_path, tmp_path / "out").read_text()).rows
    place = rows[0].index("held-out loss")
    assert [row[place] for row in rows[1:]] == ["–", "1.2346"]


def test_on_a_phone_few_runs_are_cards_and_many_a_table(tmp_path):
    """By the style sheet alone: each cell says its column."""
    write_runs(tmp_path, conditions=("all", "hot"))
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert '<table class="cards">' in text and "td::before { content: attr(data-title)" in text
    assert text.count("<td ") == text.count('<td data-title="') > 0
    for seed in range(1, 7):
        write_runs(tmp_path, conditions=("all", "hot"), seed=seed)
    text = write_report(tmp_path, tmp_path / "out").read_text()
    means, each = text.split("<summary>Each run</summary>")
    assert '<table class="cards">' in means and '<table class="cards">' not in each and "<table>" in each


def test_own_rows_show_loss_perplexity_and_token_accuracy(tmp_path):
    write_runs(tmp_path, conditions=("all",))
    result = json.loads((tmp_path / "nano-math" / "all-0" / "run.json").read_text())["evaluation"]["nano-math"]
    result |= {"loss": 1.5, "loss_ci": [1.4, 1.6], "perplexity": 4.4817, "perplexity_ci": [None, None]}
    change(tmp_path / "nano-math" / "all-0", evaluation={"nano-math": result | {"token_accuracy": 0.75}})
    rows = Page(write_report(tmp_path, tmp_path / "out").read_text()).rows
    named = dict(zip(*rows, strict=True))
    assert named["loss"] == "1.5000 [1.4000–1.6000]" and named["perplexity"] == "4.48"
    assert named["token accuracy, %"] == "75.0"


def test_runs_that_adapt_other_parts_have_tables_and_references_of_their_own(tmp_path):
    """Of attention, router and experts one, of experts alone one; the base is in both."""
    write_runs(tmp_path)
    write_runs(tmp_path / "alone", conditions=("all", "hot"))
    for name, loss in (("all-0", 20), ("hot-0", 15)):
        run = tmp_path / "alone" / "nano-math" / name
        change(run, config__train_attention=False, config__train_router=False)
        result = {"metric": "exact_match", "accuracy": loss / 200, "n": 200, "correct": loss}
        change(run, evaluation={"nano-math": result})
    (section,) = read_sections(find_records(tmp_path))
    whole, alone = section_tables(section)
    assert (whole.adapted, alone.adapted) == ("attention, router and experts", "experts alone")
    assert [row.name for row in alone.rows] == ["base", "all", "hot 25%"] and len(whole.rows) == 5
    assert alone.rows[2].cells["difference"] == "−2.5", "against all experts alone"
    for table in (whole, alone):
        (every,) = [row for row in table.rows if row.condition == "all"]
        assert every.cells["difference"] == "–", "not against the other table's"
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "Results on nano-math: LoRA on experts alone" in text and Page(text).images == 5  # a loss picture of each
    console = Console(width=84, file=io.StringIO())
    console.print(conditions_table(find_records(tmp_path)))
    assert "experts alone" in console.file.getvalue()


def test_pictures_say_whose_plan_they_show(tmp_path):
    write_runs(tmp_path, conditions=("all", "random", "cold"))
    text = write_report(tmp_path, tmp_path / "out").read_text()
    assert "Boxes: the experts that the plan of random 25% keeps. Counted for random 25%." in text
    write_runs(tmp_path, conditions=("hot",))
    change(tmp_path / "nano-math" / "hot-0", name="mine")
    assert "Boxes: the experts that the plan of mine keeps." in write_report(tmp_path, tmp_path / "out").read_text()
    for name in ("hot-0", "random-0", "cold-0"):
        shutil.rmtree(tmp_path / "nano-math" / name)
    assert "Boxes" not in write_report(tmp_path, tmp_path / "out").read_text(), "all experts need none"


def test_held_out_losses_are_in_the_picture(tmp_path):
    write_runs(tmp_path, conditions=("all",))
    assert "Dots:" not in write_report(tmp_path, tmp_path / "out").read_text()
    file = tmp_path / "nano-math" / "all-0" / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 61, "loss": 0.3, "eval_loss": 0.35}\n')
    assert "Dots: the loss on held-out data." in write_report(tmp_path, tmp_path / "out").read_text()
    file.write_text(file.read_text() + '{"step": 62, "loss": 0.3, "eval_loss": "x"}\n')
    assert "line 62: step &#39;62&#39; or eval_loss &#39;x&#39; is no number" in (
        write_report(tmp_path, tmp_path / "out").read_text()
    )


def test_a_report_imports_little():
    """Each of these takes as long as the page's own work; neither is needed to draw one."""
    code = (
        "import sys, hotlora.report.page\n"
        "from hotlora.evaluation.stats import paired_difference, proportion_interval\n"
        "proportion_interval(3, 10), paired_difference([1, 0, 1], [0, 0, 1])\n"
        "print(*{'scipy', 'pandas', 'datasets', 'transformers', 'peft', 'trl'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_human_units():
    assert [human_count(x) for x in (0, 999, 1000, 84_967_424, 311_459_840, 6_919_161_856)] == [
        "0", "999", "1.0K", "85.0M", "311.5M", "6.9B"
    ]  # fmt: skip
    assert [human_bytes(x) for x in (12, 1500, 999_999, 339_738_624, 1.25e9)] == [
        "12 B", "1.5 kB", "1.0 MB", "339.7 MB", "1.2 GB"
    ]  # fmt: skip
    assert [human_seconds(x) for x in (None, 0.25, 42.4, 93.1, 7260)] == [
        "–", "0.2 s", "42 s", "1 min 33 s", "2 h 1 min"
    ]  # fmt: skip


def test_what_a_run_covers_does_not_go_by_its_neighbours(tmp_path):
    """Each by the profile that it was planned from: two seeds' differ."""
    shares = {}
    for n, name in enumerate(("hot", "all")):
        counts = torch.tensor([[40, 30, 20, 10], [10, 20, 30, 40]]) + 5 * n
        profile = RoutingProfile((0, 1), counts, counts.double(), int(counts[0].sum()), 1, {"fingerprint": "x"})
        folder = tmp_path / name
        profile.save(folder / "profile.safetensors")
        plan = select_experts(profile, rule="hot", experts_per_layer=1)
        plan.save(folder / "plan.json")
        sections = {"profile": {"path": "profile.safetensors"}, "plan": {"path": "plan.json", "rule": "hot"}}
        record = new_record(name=name, condition=name, model={"name": "m", "fingerprint": "x"}, data={"name": "d"})
        write_record(folder, {**record, **sections, "status": "done"})
        alone = find_records(folder)
        (section,) = read_sections(alone)
        shares[name] = table_rows(section, "d")[0].cells["covered"]
    (section,) = read_sections(find_records(tmp_path))
    assert {row.name: row.cells["covered"] for row in table_rows(section, "d")} == shares
    assert shares["hot"] == "40.0%" != shares["all"]
