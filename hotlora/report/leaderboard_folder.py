"""A leaderboard's folder: runs in MODEL/TASK/METHOD/seedN, and `board.json`, which lists them and what they must share.

A folder of any other runs is read as one, too: its protocol is then that of most of them.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import DataError, FileError
from ..base.files import atomic_folder, read_json, sha256_file, write_json
from ..base.lock import locked
from ..base.records import Record, find_records
from .leaderboard_protocol import (
    board_key,
    check_protocol,
    faults,
    is_trained,
    method_fault,
    method_of,
    option_differences,
    protocol_differences,
    protocol_of,
    score,
    shared_protocol,
    task_of,
)

INDEX = "board.json"
VERSION = 1
_KEPT = ("run.json", "plan.json")


@dataclass(frozen=True)
class Entry:
    """A run on the board. key: of its protocol; seed: None of a model as it is, which has none."""

    folder: Path
    record: Record
    key: str
    method: str

    @property
    def seed(self) -> int | None:
        return self.record["seed"] if is_trained(self.record) else None


@dataclass(frozen=True)
class Board:
    """The runs on a leaderboard.

    Attributes:
        protocols: of each model and task (`board_key`).
        left_out: what of the folder is not on it, and why.
        listed: the runs that `board.json` has; None without one, where the protocol is read off the runs each time.
    """

    folder: Path
    protocols: Mapping[str, Mapping[str, Any]]
    entries: tuple[Entry, ...]
    left_out: Mapping[Path, str]
    listed: Mapping[str, Mapping[str, str]] | None = None


@dataclass(frozen=True)
class Added:
    """What `add_runs` did: runs that came in, and those that were there already."""

    new: tuple[Entry, ...]
    known: tuple[Path, ...]


def read_board(folder: str | os.PathLike[str]) -> Board:
    """The leaderboard in a folder: what `board.json` lists, or, without one, the runs of the protocol that most follow.

    FileError: no such folder, or a broken `board.json`. DataError: no training that is done and has a score.
    """
    folder = Path(folder)
    broken: dict[Path, str] = {}
    records = find_records(folder, broken)
    if not (folder / INDEX).is_file():
        return _read_off(folder, records, broken)
    protocols, runs = _read_index(folder / INDEX)
    entries, left_out, gone = [], dict(broken), dict(runs)
    for run in broken:
        gone.pop(run.relative_to(folder).as_posix(), None)
    for run, record in records.items():
        told = gone.pop(run.relative_to(folder).as_posix(), None)
        if told is None:
            left_out[run] = "it was not added: give it to --add"
        elif sha256_file(run / "run.json") != told["sha256"] or board_key(record) not in protocols:
            left_out[run] = "run.json was changed since it was added: restore a copy, or delete it and add it again"
        elif found := faults(run, record):  # plan.json was changed, or an earlier version saw less
            left_out[run] = f"{'; '.join(found)}; restore a copy, or add it again"
        else:
            entries.append(Entry(run, record, str(board_key(record)), told["method"]))
    left_out |= {folder / name: "it is gone: restore a copy, or add it again" for name in gone}
    return Board(folder, protocols, tuple(entries), left_out, runs)


def add_runs(
    folder: str | os.PathLike[str], sources: Sequence[str | os.PathLike[str]], *, name: str | None = None
) -> Added:
    """Copies runs (run.json and plan.json) onto the leaderboard in a folder, all of them or none. The first ones found
    it: what they share is its protocol from then on.

    Args:
        sources: runs' folders, or folders with runs in them and below.
        name: of the method; None: each run's condition.

    Raises:
        DataError: a run is not of the protocol, not done, contradicts itself, or has the name of a method with other
            options: each is named, with what is asked.
        FileError: no such folder, or a record that is broken.
    """
    folder = Path(folder)
    _checked(folder, sources, name)  # before there is a folder
    with locked(folder):
        board, new, known = _checked(folder, sources, name)
        there = {entry.folder.relative_to(folder).as_posix(): _told(entry) for entry in board.entries}
        runs = {**there, **(board.listed or {})}
        placed: list[Entry] = []
        try:
            for entry in new:
                at = folder / _place(entry)
                with atomic_folder(at) as beside:
                    _copy(entry.folder, beside)
                placed.append(Entry(at, entry.record, entry.key, entry.method))
                runs[_place(entry)] = _told(placed[-1])
            if new or board.listed is None:
                write_json(folder / INDEX, {"version": VERSION, "protocols": board.protocols, "runs": runs})
        except BaseException:  # what the index does not list is not on the board
            for entry in placed:
                shutil.rmtree(entry.folder, ignore_errors=True)
            raise
    return Added(tuple(placed), tuple(known))


def _checked(
    folder: Path, sources: Sequence[str | os.PathLike[str]], name: str | None
) -> tuple[Board, list[Entry], list[Path]]:
    """The board, what comes onto it, and what is there already."""
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file: give a folder")
    board = read_board(folder) if folder.is_dir() and _has_runs(folder) else None
    found = {run: record for source in sources for run, record in find_records(source).items()}
    if not found:
        raise DataError(f"{', '.join(map(str, sources))}: no run.json there or below: give folders that hold runs.")
    if board is None:
        done = {run: record for run, record in found.items() if not faults(run, record)}
        board = Board(folder, _protocols(done) if done else {}, (), {})
    known_hashes = {sha256_file(entry.folder / "run.json") for entry in board.entries}
    entries, known = list(board.entries), []
    wrong: dict[tuple[str, ...], list[tuple[Path, int]]] = {}
    for run, record in found.items():
        if sha256_file(run / "run.json") in known_hashes:
            known.append(run)
            continue
        method = method_of(record) if name is None else name
        entry = Entry(run, record, str(board_key(record)), method)
        told = _refusal(run, record, method, board.protocols, entries)
        places = [other.folder for other in board.entries]
        places += [folder / _place(other) for other in entries[len(board.entries) :]]
        if not told and (why := _taken(folder / _place(entry), run, places, board)):
            told = [why]
        if told:
            wrong.setdefault((method, *told), []).append((run, record["seed"]))
        else:
            entries.append(entry)
            known_hashes.add(sha256_file(run / "run.json"))
    if wrong:
        number = sum(map(len, wrong.values()))
        raise DataError(
            f"{number} of {len(found)} runs cannot stand on the leaderboard {folder}, and none was added:\n"
            + "\n".join(_of_alike(key, runs) for key, runs in wrong.items())
        )
    return board, entries[len(board.entries) :], known


def _of_alike(key: tuple[str, ...], runs: Sequence[tuple[Path, int]]) -> str:
    """A line for the runs of a method that are refused for the same reasons."""
    method, *told = key
    seeds = f"seed{'s' * (len(runs) > 1)} {', '.join(str(seed) for _, seed in runs)}"
    others = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"- {method}, {seeds} ({runs[0][0]}{others}): {'; '.join(told)}"


def _refusal(
    run: Path, record: Record, method: str, protocols: Mapping[str, Mapping[str, Any]], entries: Sequence[Entry]
) -> list[str]:
    """Why a run cannot stand beside `entries`; empty where it can."""
    if told := faults(run, record):
        return told
    key = str(board_key(record))
    if key not in protocols:
        there = " and ".join(f"{known['task']} by {known['fingerprint']}" for known in protocols.values())
        mine = f"{task_of(record)} by the model {record['model']['fingerprint']}"
        return [f"it is scored on {mine}, and the board has {there or 'nothing'}: begin another board"]
    asked = protocols[key]
    told = protocol_differences(protocol_of(record), asked)
    told += [fault] if (fault := method_fault(method)) else []
    seed = record["seed"] if is_trained(record) else None
    if seed is not None and seed not in asked["seeds"]:
        told.append(f"seed {seed}, and one of {', '.join(map(str, asked['seeds']))} is asked (--seed)")
    if told:
        return told
    for other in entries:
        if (other.key, other.method) != (key, method):
            continue
        if other.seed is None or seed is None:
            return [f"{method} is there already, as {other.folder}: give another name by --name"]
        if found := option_differences(record, other.record):
            return [f"{method} is there with other options: {', '.join(found)}: give another name by --name"]
        if other.seed == seed:
            scores = f"{score(record):.4g} here, {score(other.record):.4g} there"
            return [f"seed {seed} of {method} is there already, from another run ({scores}): leave one out"]
    return []


def _read_off(folder: Path, records: Mapping[Path, Record], broken: Mapping[Path, str]) -> Board:
    """Of a folder without `board.json`."""
    faulty = {run: found for run, record in records.items() if (found := faults(run, record))}
    protocols = _protocols({run: record for run, record in records.items() if run not in faulty})
    entries: list[Entry] = []
    left_out = dict(broken)
    for run, record in records.items():
        method = method_of(record)
        if told := faulty.get(run) or _refusal(run, record, method, protocols, entries):
            left_out[run] = "; ".join(told)
        else:
            entries.append(Entry(run, record, str(board_key(record)), method))
    return Board(folder, protocols, tuple(entries), left_out)


def _protocols(records: Mapping[Path, Record]) -> dict[str, dict[str, Any]]:
    """Of each model and task that there are trainings of, in order."""
    found: dict[str, list[Record]] = {}
    for record in filter(is_trained, records.values()):
        found.setdefault(str(board_key(record)), []).append(record)
    if not found:
        shared_protocol([])  # tells what is missing
    return {key: shared_protocol(found[key]) for key in sorted(found)}


def _read_index(file: Path) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    index = read_json(file)
    protocols, runs = index.get("protocols"), index.get("runs")
    if index.get("version") != VERSION or not isinstance(protocols, dict) or not isinstance(runs, dict):
        raise FileError(f"{file} is not a leaderboard's index of version {VERSION}: restore a copy of it")
    for name, told in runs.items():
        texts = [told.get(key) for key in ("method", "sha256")] if isinstance(told, dict) else [None]
        if not all(isinstance(text, str) for text in texts) or method_fault(str(texts[0])):
            raise FileError(f"{file}: {name!r} is {told!r}, and not a run's method and hash: restore a copy of it")
    return {key: check_protocol(protocol, f"{file}: {key!r}") for key, protocol in protocols.items()}, runs


def _has_runs(folder: Path) -> bool:
    return (folder / INDEX).is_file() or next(folder.rglob("run.json"), None) is not None


def _place(entry: Entry) -> str:
    names = (entry.record["model"]["fingerprint"], str(task_of(entry.record)))
    above = ["".join(sign if sign.isalnum() or sign in "_+-." else "-" for sign in name) for name in names]
    above = [name.lstrip(".") or "-" for name in above]
    return "/".join([*above, entry.method, *([] if entry.seed is None else [f"seed{entry.seed}"])])


def _taken(place: Path, run: Path, places: Sequence[Path], board: Board) -> str:
    """Why a run cannot have a place: its record on the board was changed, something else is there, or a run above or
    below. Empty where it can, as where an `add_runs` of this run left it that was killed."""
    there, own = place / "run.json", sha256_file(run / "run.json")
    found = sha256_file(there) if there.is_file() else None
    listed = (board.listed or {}).get(place.relative_to(board.folder).as_posix(), {}).get("sha256")
    if listed and found and place in board.left_out and not own == found == listed:
        return f"{place}: {board.left_out[place]}"
    is_near = any(place == other or place in other.parents or other in place.parents for other in places)
    if is_near or (place.exists() and found != own):
        return f"{place} holds something else: move that, or delete it"
    return ""


def _told(entry: Entry) -> dict[str, str]:
    return {"method": entry.method, "sha256": sha256_file(entry.folder / "run.json")}


def _copy(run: Path, beside: Path) -> None:
    beside.mkdir()
    for file in _files(run):
        shutil.copyfile(file, beside / file.name)


def _files(run: Path) -> Iterator[Path]:
    return (run / name for name in _KEPT if (run / name).is_file())
