"""The command `data`: rows as a model will see them, and how long they are. Loads the tokenizer alone."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..base.errors import DataError
from ..runs.options import ProfileOptions
from .options import AsJson, options_of, out

_BARS, _WIDTH = 12, 40


@options_of(ProfileOptions, only=("model", "limit", "seed", "train_on", "columns", "apply_chat_template"))
def data(
    source: Annotated[
        str, typer.Argument(metavar="DATA", help="What --data takes: a task, a file or a folder of rows, a Hub id.")
    ],
    rows: Annotated[int, typer.Option(help="Rows to show.")] = 3,
    split: Annotated[str, typer.Option(help="Of a task, a folder or a Hub id: train, test, …")] = "train",
    max_length: Annotated[int, typer.Option(help="Tokens of an example; longer ones are cut from the right.")] = 512,
    as_json: AsJson = False,
    **given: Any,
) -> None:
    """Show rows as the model will see them, what of them is trained, and how long they are. Loads no model."""
    from ..hf.models import context_length, load_config, load_tokenizer, vocab_size
    from ..tasks.data import load_examples
    from ..tasks.tokens import token_lengths, tokenize, told

    if rows < 0:
        raise DataError(f"--rows {rows} is out of range: give 0 or more.")
    if split != "train" and Path(source).expanduser().is_file():
        raise DataError(f"--split is of a task, a folder or a Hub id, and {source} is one file: leave it out.")
    options = ProfileOptions(**given, max_length=max_length)
    tokenizer = load_tokenizer(options.model)
    read: dict[str, Any] = {"tokenizer": tokenizer, **options.reading()}
    examples = load_examples(source, split, limit=options.limit, seed=options.seed, **read)
    window = context_length(load_config(options.model), tokenizer)
    dataset = tokenize(examples, tokenizer, max_length, vocab_size=vocab_size(options.model), window=window)
    lengths = token_lengths(dataset)
    if as_json:
        trained = [sum(mask) for mask in dataset["completion_mask"]]
        out.print_json(data={
            "data": source, "rows": len(examples), "left_out": len(examples) - len(dataset),
            "cut": sum(dataset["cut"]), "tokens": sum(lengths), "trained_tokens": sum(trained), "lengths": lengths,
            "uncut_lengths": list(dataset["length"]),
        })  # fmt: skip
        return
    for row in dataset.select(range(min(rows, len(dataset)))):
        place = examples[row["index"]].place or f"row {row['index'] + 1}"
        cut = f", cut at {max_length:,}" if row["cut"] else ""
        out.rule(Text(f"{Path(place).name}: {len(row['input_ids']):,} tokens{cut}"), style="dim", align="left")
        out.print(_shown(row["input_ids"], row["completion_mask"], tokenizer))
    if rows:
        out.rule(style="dim")
    out.print(_histogram(list(dataset["length"])), end="")  # before they are cut: to choose --max-length by
    out.print(f"{source}: {told(examples, dataset, options.train_on)}")


def _shown(ids: list[int], mask: list[int], tokenizer: Any) -> Text:
    """The tokens as text, those that carry loss in green; where there are no colours, in ⟦ ⟧."""
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and mask[end] == mask[start]:
            continue
        part = tokenizer.decode(ids[start:end])
        if not mask[start]:
            text.append(part, style="dim")
        else:
            text.append(part if out.is_terminal else f"⟦{part}⟧", style="green")
        start = end
    return text


def _histogram(lengths: list[int]) -> str:
    """Rows by their number of tokens, a line for each range."""
    low = min(lengths)
    step = -(-(max(lengths) - low + 1) // _BARS)
    counts = [0] * ((max(lengths) - low) // step + 1)
    for length in lengths:
        counts[(length - low) // step] += 1
    lines = []
    for number, count in enumerate(counts):
        bar = "█" * round(_WIDTH * count / max(counts)) or ("▏" if count else "")
        lines.append(f"{low + number * step:>7,} to {low + (number + 1) * step - 1:>6,} tokens  {bar} {count:,}\n")
    return "".join(lines)
