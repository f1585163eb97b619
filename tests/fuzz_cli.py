"""Commands with random arguments: each ends with 0, or 1 or 2 and one message; no traceback, no changed input, nothing
half-written.

The inputs are small and whole, so some commands do run. What would take minutes (a demo, a bench, steps by the million)
is kept out of the values.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import fuzz
import typer
from hypothesis import strategies as st
from peft import get_peft_model
from tiny import tiny_batch, tiny_config, tiny_model, tiny_plan
from tiny_tokenizer import byte_tokenizer

from hotlora import HotLoraConfig, select_experts
from hotlora.cli import main as cli
from hotlora.routing.profiler import profile_routing

GROUP = typer.main.get_command(cli.app)
COMMANDS = tuple(sorted(GROUP.commands))
TEXTS = (
    "", " ", "0", "-1", "1", "2", "3", "8", "0.5", "1.5", "nan", "inf", "-inf", "1e308", "x", "é🙂", "a,b", "1,2",
    "hot", "all", "auto", "none", "lora", "--", "-", "../..", "/nowhere/at/all", "\n", "nano-math:x", "gsm8k:nowhere",
    "[bold]", "bfloat16", "float64", "cpu", "cuda:7", "True", "null", "{}",
)  # fmt: skip
OUTPUTS = ("out", "out/x.json", "x.safetensors", ".", "", "/dev/null/x", "/proc/nothing/x", "é🙂", "a" * 300)
# What would run for minutes, or ask for more memory than there is, has values of its own.
SOME: dict[str, tuple[str, ...]] = {
    "--max-steps": ("1", "2", "0", "-1", "x"), "--epochs": ("1", "0", "-1", "nan", "x"),
    "--max-length": ("64", "2", "1", "0", "-1"), "--batch-size": ("1", "4", "0", "-1", "x"),
    "--length": ("8", "0", "-1"), "--tokens": ("8", "0", "-1"), "--r": ("1", "4", "0", "-1", "1.5"),
    "--gradient-accumulation-steps": ("1", "2", "0", "-1"), "--samples": ("1", "2", "0", "-1"),
    "--processes": ("0", "-1", "x"), "--task": ("x", "", "gsm8k", "hexphi"), "--rounds": ("0", "-1", "x"),
    "--reprofile-every": ("1", "0", "-1"), "--method": ("x", "", "hellora", "sieve", "fft", "dora", "lori-s", "esft"),
    "--seed": ("0", "-1", "99999999999999999999", "x"), "--data": ("nano-choice", "x", "", "gsm8k:nowhere", "{rows}"),
    "--model": ("{model}", "/nowhere", "", "{config}", "{rows}", "./x"), "--limit": ("2", "1", "0", "-1", "x"),
    **dict.fromkeys(("--output", "--csv", "--latex", "--markdown"), OUTPUTS),
    "--test-limit": ("2", "1", "0", "-1", "x"), "--test-data": ("{rows}", "x", "", "nano-choice"),
}  # fmt: skip
PATHS = (
    "{model}",
    "{adapter}",
    "{profile}",
    "{counts}",
    "{plan}",
    "{rows}",
    "{config}",
    "{runs}",
    "{file}",
    "out",
    "out/x.json",
    ".",
    "",
)
# Given first, so that an option that is drawn comes last and counts.
FIRST: dict[str, str] = {
    "train": "--model {model} --data {rows} --max-steps 1 --limit 3 --test-limit 2 --batch-size 2 -o out",
    "evaluate": "--model {model} --data nano-choice --limit 2 --batch-size 2",
    "profile": "--model {model} --data {rows} --limit 3 --max-length 64",
    "plan": "{profile}", "params": "{config}", "export": "--model {model} {adapter} -o out --format peft",
    "import": "{counts} -o out/p.safetensors",
    "merge": "--model {model} {adapter} -o out", "combine": "--model {model} {adapter} {adapter} -o out",
    "demo": "--task x", "bench": "--rounds 0", "sweep": "{file} --dry-run", "report": "{runs} -o out",
    "compare": "{runs}", "leaderboard": "out --add {runs}",
    "data": "{rows} --model {model}", "push": "{adapter} owner/name",
    "verify": "{model} --adapter {adapter} --engine mlx",
    "generate": "x --adapter {adapter} --max-new-tokens 2", "chat": "{adapter} --max-new-tokens 2",
}  # fmt: skip
_LEFT = re.compile(r"\.[0-9a-f]{12}-.+")


@dataclass
class Bench:
    """The inputs, and a folder to work in."""

    inputs: Path
    work: Path

    def __post_init__(self) -> None:
        base = tiny_model("olmoe", vocab_size=259, max_position_embeddings=512)
        base.save_pretrained(self.inputs / "model")
        byte_tokenizer().save_pretrained(self.inputs / "model")
        profile = profile_routing(base, [tiny_batch()])
        profile.save(self.inputs / "profile.safetensors")
        select_experts(profile, fraction=0.25).save(self.inputs / "plan.json")
        get_peft_model(base, HotLoraConfig(plan=tiny_plan(base), r=2)).save_pretrained(self.inputs / "adapter")
        rows = ({"prompt": f"{i} and", "completion": f" {i}"} for i in range(6))
        (self.inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.inputs / "config.json").write_text(json.dumps(tiny_config("olmoe").to_dict()))
        (self.inputs / "counts.json").write_text(json.dumps({"counts": [[3, 1], [2, 2]], "num_tokens": 4}))
        (self.inputs / "sweep.py").write_text("SWEEP = 1\n")
        fuzz.write_runs(self.inputs / "runs")
        names = (
            "model", "adapter", "runs", "profile.safetensors", "plan.json", "rows.jsonl", "config.json", "counts.json"
        )  # fmt: skip
        self.words = {name.split(".")[0]: str(self.inputs / name) for name in names}
        self.words["file"] = str(self.inputs / "sweep.py")
        self.before = self.state()

    def state(self) -> dict[str, str]:
        return {
            str(path): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.inputs.rglob("*"))
            if path.is_file()
        }

    def run(self, words: list[str]) -> int:
        """The exit code. AssertionError where a rule is broken; whatever else is raised is a traceback."""
        words = [word.format(**self.words) if re.fullmatch(r"\{[a-z]+\}", word) else word for word in words]
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        here, argv = os.getcwd(), sys.argv
        os.chdir(self.work)
        sys.argv = ["hotlora", *words]
        out, err = io.StringIO(), io.StringIO()
        code: object = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os.chdir(here)
            sys.argv = argv
        assert code in (0, 1, 2), (words, code)
        said = err.getvalue() + out.getvalue()
        assert "Traceback" not in said, (words, said)
        assert code == 0 or len(said.strip()) > 10, (words, "failed without a word")
        assert self.state() == self.before, (words, "an input was changed")
        left = [str(path) for path in self.work.rglob("*") if _LEFT.fullmatch(path.name)]
        assert not left, (words, left)
        assert isinstance(code, int)
        return code


@st.composite
def arguments(draw: st.DrawFn, command: str) -> list[str]:
    """Words of a command: its usual ones, some options with any value, and seldom a word that nobody asked for."""
    options = [parameter for parameter in GROUP.commands[command].params if parameter.opts[0].startswith("-")]
    words = [command]
    if draw(st.integers(0, 9)):
        words += FIRST[command].split()
    for option in draw(st.lists(st.sampled_from(options), max_size=3, unique_by=lambda option: option.opts[0])):
        names = [*option.opts, *option.secondary_opts]
        name = draw(st.sampled_from(names))
        long = next((name for name in option.opts if name.startswith("--")), option.opts[0])
        words.append(name)
        if not getattr(option, "is_flag", False):
            words.append(draw(st.sampled_from(SOME[long] if long in SOME else (*TEXTS, *PATHS))))
    if command in ("demo", "bench", "sweep"):  # never for real
        words += {"demo": ["--task", "x"], "bench": ["--rounds", "0"], "sweep": ["--dry-run"]}[command]
    if not draw(st.integers(0, 9)):
        words.append(draw(st.sampled_from(TEXTS)))
    return words
