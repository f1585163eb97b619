"""The examples of tasks, of people's files and folders, and of data sets on the Hub."""

import hashlib
import json
import logging
import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..base.errors import DataError
from ..base.files import read_json, visible_files
from ..base.options import did_you_mean
from . import TASKS, Example, Task, codealpaca, gsm8k, task_of
from .chat import ChatTemplate, Notes
from .formats import CHAT_FIELDS, Found, detect, read_columns, renamed_columns
from .in_memory import save_rows
from .messages import LOSS_MARKS, Conversation, as_plain_text, is_empty, read_conversation, trained_turns
from .rows import SUFFIXES, Row, folder_rows, hub_rows, iter_rows, need_text
from .split import drawn
from .stored import StoredExamples
from .task import TRAINED

_log = logging.getLogger(__name__)

_CHAT_FILE = ".chat.json"  # beside FILE.jsonl, for all its rows


def load_examples(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    train_on: str = "assistant",
    columns: str | Mapping[str, str] | None = None,
    apply_chat_template: bool | None = None,
    tell: bool = True,
    tell_unread: bool = True,
) -> Sequence[Example]:
    """The examples of a split of a task, of local files, or of a data set on the Hub.

    Args:
        source: a task's name (`nano-math`), a task and its local files (`spider:/data/spider`); a file (JSON lines,
            JSON, CSV, Parquet) or a folder of them; or a Hub id (`openai/gsm8k`), with a configuration, a split and a
            part of it if need be (`openai/gsm8k:main:train[:1000]`). `formats.detect` has what a row may hold. A file
            is one split, whatever `split` says. Or rows in memory, as `save_rows` takes them.
        split: "train" or "test"; for a Hub id, any split it has.
        limit: at most so many examples, drawn by `seed` and left in their order; a generated task draws anew.
        tokenizer: whose chat template turns conversations into text.
        tools, chat_template_kwargs: what the template is given besides, as `apply_chat_template` takes it; None: what
            FILE.chat.json beside FILE.jsonl holds under these names. A row may have its own: its tools come in place
            of these, its chat_template_kwargs come before them.
        now: the time that a template which writes the date is told; None: the present.
        train_on: what carries loss: "assistant" (every assistant turn of a conversation; the completion), "last" (the
            last answer) or "all" (prompts and answers).
        columns: the rows' own names of the formats' fields, `prompt=question,completion=answer`.
        apply_chat_template: whether the chat template writes the rows. None: where they are conversations, or Alpaca's,
            and the tokenizer has one; texts of prompt and completion stay as they are.
        tell, tell_unread: log what is worth to know of the rows; what of them nothing reads, too.

    Returns:
        A task's as a list; people's own rows in a temporary file, however many: each is read when it is asked for.

    Raises:
        DataError: no such source or split; no rows; a row without its fields, or that the chat template refuses (file
            and line).
    """
    if limit is not None and limit < 1:
        raise DataError(f"A limit of {limit} examples leaves none; give at least 1.")
    if not isinstance(source, str | os.PathLike):
        with TemporaryDirectory(prefix="hotlora-rows-", ignore_cleanup_errors=True) as folder:
            file = save_rows(source, Path(folder) / "rows.jsonl")
            return load_examples(
                file, split, limit, seed, tokenizer, tools=tools, chat_template_kwargs=chat_template_kwargs, now=now,
                train_on=train_on, columns=columns, apply_chat_template=apply_chat_template, tell=tell,
                tell_unread=tell_unread,
            )  # fmt: skip
    source = os.fspath(source)
    if train_on not in TRAINED:
        raise DataError(f"train_on = {train_on!r} does not exist: choose one of {', '.join(TRAINED)}.")
    task = task_of(source)
    if task is not None:
        if columns is not None or apply_chat_template:
            raise DataError(f"{source} is a task, whose prompt is its own: leave columns and apply_chat_template out.")
        found = task.load(split, source.partition(":")[2] or None, limit, seed)
        examples: Sequence[Example] = [_trained(example, train_on) for example in found]
    else:
        shared = _chat_options(source)
        shared |= {"tools": list(tools)} if tools is not None else {}
        shared |= {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs is not None else {}
        reader = _Reader(
            tokenizer, shared, apply_chat_template, train_on, {} if columns is None else read_columns(columns),
            now or datetime.now(),
        )  # fmt: skip
        with closing(_rows(source, split)) as rows:  # a row may be refused, and Windows deletes no file that is open
            examples = StoredExamples.write(_trained(reader.example(row), train_on) for row in rows)
        if tell:
            reader.tell(source, tell_unread)
    return drawn(examples, limit, seed)


def _trained(example: Example, train_on: str) -> Example:
    """Of a text, the prompt too, where `train_on` says so; a conversation's spans have that already."""
    if train_on == "all" and example.text is None and example.prompt:
        return replace(example, spans=((0, len(example.prompt)),))
    return example


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over every example's prompt and completion, in order; of a conversation, over what was read."""
    digest = hashlib.sha256()
    for example in examples:
        read = [example.source_hash] if example.source_hash else [example.prompt, example.completion]
        digest.update(json.dumps(read).encode())
    return digest.hexdigest()


def scorer_hash(task: Task | None, examples: Iterable[Example]) -> str | None:
    """SHA-256 over what judges every example's answer beside `data_hash`'s text: choices, the right one's place, unit
    tests, databases. None where there is nothing of the kind."""
    if task is None:
        return None
    digest, is_judged = hashlib.sha256(), False
    for example in examples:
        by = task.judged_by(example)
        is_judged |= bool(example.choices or by)
        digest.update(json.dumps([example.choices, example.label, by], sort_keys=True).encode())
    return digest.hexdigest() if is_judged else None


def trained_parts(train_on: str, examples: Iterable[Example]) -> str | None:
    """`train_on`, where it trains another part of these examples than each one's completion; else None."""
    return train_on if train_on == "all" or any(len(e.spans) > (e.text is not None) for e in examples) else None


def _rows(source: str, split: str) -> Generator[Row]:
    if not source.strip():  # a variable of the shell that is not set; as a path it would be the folder that one is in
        raise DataError("the data's name is empty: give a file, a folder, a Hub id or a task.")
    path = Path(source).expanduser()
    if path.is_file():
        return iter_rows(path)
    if path.is_dir():
        return folder_rows(path, split)
    if source.endswith(SUFFIXES) or source[:1] in "./~" or source.partition(":")[0].count("/") != 1:
        raise DataError(
            f"There is no data {source!r}{_nearest(path)}: it is no file or folder here and no task; give a file "
            f"({', '.join(SUFFIXES)}), a Hub id (owner/name), or one of {', '.join(TASKS)}."
        )
    return hub_rows(source, split)


def _nearest(path: Path) -> str:
    """Of the tasks and the files beside it, the one that a name which is neither may stand for."""
    try:
        beside = [str(path.with_name(file.name)) for file in path.parent.iterdir() if file.name.endswith(SUFFIXES)]
    except OSError:  # no such folder
        beside = []
    return did_you_mean(str(path), [*TASKS, *beside])


def _chat_options(source: str) -> dict[str, Any]:
    """What FILE.chat.json says for all rows of FILE.jsonl."""
    path = Path(source).expanduser()
    if path.is_dir():
        for beside in visible_files(path, f"**/*{_CHAT_FILE}"):
            _log.warning("%s is not read: it is for the rows of the file beside it, where --data names that", beside)
    if not path.is_file():
        return {}
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), path.suffix)
    beside = path.with_name(path.name.removesuffix(suffix) + _CHAT_FILE)
    if not beside.is_file():
        return {}
    found = read_json(beside)
    if unknown := sorted(set(found).difference(CHAT_FIELDS)):
        raise DataError(f"{beside}: has {', '.join(unknown)}; it may hold {' and '.join(CHAT_FIELDS)}.")
    if not isinstance(found.get("chat_template_kwargs", {}), dict):
        raise DataError(f"{beside}: 'chat_template_kwargs' must be an object.")
    _log.info("%s for all rows, from %s", " and ".join(found), beside)
    return found


@dataclass
class _Reader:
    """People's rows as examples; and what they should know of them, told at the end.

    Attributes:
        shared: tools and chat_template_kwargs of all rows.
        wanted: whether the chat template writes the rows; None: as the format has it.
        columns: a format's field -> the rows' own name of it.
    """

    tokenizer: Any
    shared: Mapping[str, Any]
    wanted: bool | None
    train_on: str
    columns: Mapping[str, str]
    now: datetime
    notes: Notes = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    num_answers: int = 0
    empty: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        has_template = bool(getattr(self.tokenizer, "chat_template", None))
        if self.wanted and self.tokenizer is not None and not has_template:
            raise DataError(
                "the tokenizer has no chat template: leave apply_chat_template out, or give its tokenizer_config.json "
                "one (a base model has none; its instruct model's may serve)."
            )
        given = has_template and self.wanted is not False
        self.template = ChatTemplate(self.tokenizer, self.now, self.notes, self.train_on) if given else None

    def example(self, row: Row) -> Example:
        self.unread |= (row.values.keys() & self.columns.keys()) - set(self.columns.values())  # another takes its name
        row = renamed_columns(row, self.columns)
        found = detect(row)
        messages, read = found.messages, found.read
        if found.note:
            self.notes.setdefault(found.note, row.place)
        if found.is_text and self.wanted and found.format != "text":
            messages = messages or _as_messages(row, found)
        elif found.is_text and self.template is None:
            messages = None
        if messages is None:
            example, how = self._as_text(row, found), "as they are"
            is_blank = not example.completion.strip()
        else:
            talk = read_conversation(
                row, self.shared.get("tools"), self.shared.get("chat_template_kwargs"),
                messages=messages, first_trained=found.first_trained,
            )  # fmt: skip
            if len(talk.messages) < len(messages):
                self.notes.setdefault("what follows the last answer carries no loss and is left out", row.place)
            if self.template is not None:
                example, how, read = self.template.example(talk), "by the chat template", (*read, *CHAT_FIELDS)
            else:
                example = as_plain_text(talk, sized=self.tokenizer is None, every_turn=self.train_on == "assistant")
                how, read = "as plain text", tuple(name for name in read if name not in CHAT_FIELDS)
                self._note_plain(talk)
            is_blank = is_empty(talk.messages[-1])
            earlier = trained_turns(talk) if self.train_on != "last" else []
            self.num_answers += len(earlier)
            self.empty += [f"{row.place}, message {i + 1}" for i in earlier if is_empty(talk.messages[i])]
        if is_blank:
            self.empty.append(row.place)
        self.unread |= {name for name, value in row.values.items() if value is not None} - set(read)
        self.num_answers += 1
        return replace(example, format=f"{found.format}, {how}")

    def _note_plain(self, talk: Conversation) -> None:
        """What a conversation loses as plain text."""
        if self.tokenizer is None:
            note = "no tokenizer is given, so conversations are written as plain text, by no chat template"
            self.notes.setdefault(note, talk.place)
        else:
            note = (
                "the tokenizer has no chat template, so conversations are written as 'User: …', a blank line, "
                "'Assistant: …': ask the model so, too (hotlora generate --raw); hotlora chat needs a template"
            )
            self.notes.setdefault(note, talk.place)
        known = {"role", "content", "tool_calls", *LOSS_MARKS}
        left = {f"messages' {name!r}" for message in talk.messages for name in message.keys() - known if message[name]}
        left |= {f"{name!r} of all rows" for name in CHAT_FIELDS if self.shared.get(name)}
        if left:
            self.notes.setdefault(f"without a chat template {', '.join(sorted(left))} are left out", talk.place)

    def _as_text(self, row: Row, found: Found) -> Example:
        if found.format == "Alpaca":
            values = {**row.values, "input": row.values.get("input") or ""}
            return replace(codealpaca.example(Row(row.place, values)), place=row.place)
        if found.format == "question + answer":
            return replace(gsm8k.example(row), place=row.place)
        if found.format == "text" and (bos := getattr(self.tokenizer, "bos_token", None)):
            if found.completion.startswith(bos):  # a template has written it, special tokens and all
                whole = ((0, len(found.completion)),)
                return Example("", found.completion, text=found.completion, spans=whole, place=row.place)
        return Example(found.prompt, found.completion, place=row.place)

    def tell(self, source: str, unread: bool) -> None:
        """One line for each thing that a user should know."""
        if self.unread and unread:
            _log.warning("%s: nothing reads %s", source, ", ".join(sorted(self.unread)))
        for note, place in self.notes.items():
            _log.warning("%s: %s (told once)", place, note)
        if self.empty:
            _log.warning(
                "%d of %d answers are empty, from which a model learns to say nothing; the first: %s",
                len(self.empty), self.num_answers, self.empty[0],
            )  # fmt: skip


def _as_messages(row: Row, found: Found) -> list[dict[str, str]]:
    """A prompt and its completion, or a question and its answer, as a user's message and the answer to it."""
    asked, said = (found.prompt, found.completion)
    if found.format == "question + answer":
        asked, said = need_text(row, "question", "answer")
    return [{"role": "user", "content": asked.strip()}, {"role": "assistant", "content": said.strip()}]


def test_source(data: str, test_data: str | None = None) -> str | None:
    """Where test examples come from: `test_data`, else `data` where it is a task with its own test split.

    A single file is one split, so a task read from one has no other, unless all that it has is a test split; and some
    data has none at all.
    """
    if test_data is not None:
        return test_data
    task, local = task_of(data), data.partition(":")[2]
    if task is None or "test" not in task.splits:
        return None
    if "train" in task.splits and Path(local).expanduser().is_file():
        return None
    return data
