"""Writes docs/walkthrough.md: an empty folder, a file of conversations, and every command on the way to a server.

python scripts/walkthrough.py    # runs the commands on nano, some minutes on two cores, and writes what they print

The model is nano with a chat template that writes tools and calls, as served models have. The conversations are sums.
"""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "walkthrough.md"
TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.content %} {{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %} {{ call.function.name }}({{ call.function.arguments.a }}, "
    "{{ call.function.arguments.b }}){% endfor %}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "The sum of two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
        },
    }
]
CHAT = "hotlora chat runs/hot"
TRAIN = (
    "hotlora train --model model --data chat.jsonl --test-split 0.05 --eval-steps 20 --early-stopping-patience 3 "
    "--load-best --max-steps 120 --batch-size 16 --learning-rate 4e-3 --warmup-ratio 0.03"
)
STEPS: list[tuple[str, str]] = [
    (
        "What will be trained? Two rows as the model will see them: what carries loss stands in ⟦ ⟧ (green in a "
        "terminal), here both answers of the assistant and its call of a tool. No model is loaded.",
        "hotlora data chat.jsonl --model model --rows 2",
    ),
    (
        "Train. Routing is counted until it is settled which experts are hot. A twentieth of the rows is held out, its "
        "loss is taken every 20 steps, training ends when that got no better three times, and the best weights are "
        "kept.",
        f"{TRAIN} --output runs/hot",
    ),
    (
        "The same with half as many experts: are they enough?",
        f"{TRAIN} --fraction 0.125 --output runs/eighth",
    ),
    (
        "Score other rows: the exact answer, loss, perplexity and token accuracy, with intervals.",
        "hotlora evaluate --data other.jsonl --adapter runs/hot --output runs/hot-scored",
    ),
    ("", "hotlora evaluate --data other.jsonl --adapter runs/eighth --output runs/eighth-scored"),
    ("Compare the two, row by row.", "hotlora compare runs/hot-scored runs/eighth-scored"),
    ("Talk to it. The base, the tokenizer and its template are found from the run.", CHAT),
    ("One page of all runs, with pictures.", "hotlora report runs"),
    (
        "For a server: merged into a model that needs nothing of hotlora.",
        "hotlora export runs/hot --format merged -o served",
    ),
]
SAID = "2 + 3?\n40 + 7?\n"


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder)
        parts = [HEAD]
        for text, command in STEPS:
            print(f"$ {command}", file=sys.stderr)
            parts += [text] if text else []
            parts.append(f"```console\n$ {wrapped(command)}\n{run(command, folder)}\n```")
    PAGE.write_text("\n\n".join([*parts, END]) + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


HEAD = """# From a file of conversations to a server

What each command prints, from an empty folder on. The model is nano with a chat template that writes tools; put the
name or folder of yours in the place of `model`. `python scripts/walkthrough.py` runs the commands and makes this page.

`chat.jsonl` has a conversation a line, of two turns and a call of a tool."""
END = """`served` is a plain transformers model. `--format vllm`, `sglang` and `peft` write adapters in place of a model
([export.md](export.md)). nano knows nothing but small tasks: this page is about the commands, not about accuracy."""


def make(folder: Path) -> None:
    """The model and the rows."""
    sys.path.insert(0, str(PAGE.parent.parent))
    import hotlora

    model, tokenizer = hotlora.load_model("nano"), hotlora.load_tokenizer("nano")
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = random.Random(0)
    rows = [row(rng) for _ in range(900)]
    for name, some in (("chat", rows[:800]), ("other", rows[800:])):
        text = "".join(json.dumps({"messages": messages, "tools": TOOLS}) + "\n" for messages in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def row(rng: random.Random) -> list[dict[str, object]]:
    a, b, c = rng.randint(1, 50), rng.randint(1, 9), rng.randint(1, 9)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": a, "b": b}}}
    return [
        {"role": "user", "content": f"{a} + {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": str(a + b)},
        {"role": "assistant", "content": f"It is {a + b}."},
        {"role": "user", "content": f"Plus {c}?"},
        {"role": "assistant", "content": f"It is {a + b + c}."},
    ]


def run(command: str, folder: Path) -> str:
    """What it prints; an error ends all."""
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=folder, text=True, capture_output=True,
        input=SAID if command == CHAT else "",
        env={**os.environ, "PYTHONPATH": str(PAGE.parent.parent), "COLUMNS": "110", "TERM": "dumb"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{command}: {done.stdout}{done.stderr}")
    told = "\n".join(part.strip("\n") for part in (done.stderr, done.stdout) if part.strip())
    return re.sub(r"[ \t]+$", "", told, flags=re.M).replace(str(folder) + "/", "")


def wrapped(command: str) -> str:
    """On several lines where it is long."""
    lines, line = [], ""
    for word in command.split(" "):
        if len(line) + len(word) > 100 and word.startswith("--"):
            lines.append(line)
            line = ""
        line = f"{line} {word}".strip()
    return " \\\n    ".join([*lines, line])


if __name__ == "__main__":
    main()
