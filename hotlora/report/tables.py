"""Run records -> rows of text, for the page and for the terminal. Loads no model."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..base.errors import FileError, HotLoraError
from ..base.escape import one_line
from ..base.records import Record, read_results
from ..evaluate.stats import Difference, paired_difference, proportion_interval
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from .text import NONE

ORDER = ("base", "all", "hot", "random", "cold")
COLUMNS = {
    "accuracy": "accuracy, %", "difference": "against all, points", "covered": "routing covered",
    "trained": "trained parameters", "adapter": "adapter file", "speed": "tokens/s", "memory": "peak memory",
}  # fmt: skip

Records = Mapping[Path, Record]


@dataclass
class Section:
    """The runs on one data set and one model, with the profile and plans that their files hold."""

    data: str
    model: str
    records: dict[Path, Record]
    profile: RoutingProfile | None = None
    plan: ExpertPlan | None = None
    plans: dict[Path, ExpertPlan] = field(default_factory=dict)
    profiles: dict[Path, RoutingProfile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def by_loss(self) -> bool:
        """Whether the held-out loss stands for a score: no run was scored on a task."""
        records = self.records.values()
        return not any(record.get("evaluation") for record in records) and any(map(_test_loss, records))

    @property
    def columns(self) -> dict[str, str]:
        """COLUMNS, with the score that there is."""
        return COLUMNS | ({"accuracy": "held-out loss", "difference": "against all"} if self.by_loss else {})

    def note(self, text: str) -> None:
        """Remembers what was left out, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def tasks(self) -> list[str]:
        """What the runs were evaluated on, the training data's own task first."""
        names = {name for record in self.records.values() for name in part(record, "evaluation")}
        return sorted(names, key=lambda name: (name != self.data, name)) or [self.data]


@dataclass(frozen=True)
class Row:
    """One run, as text: the same in the page and in the terminal."""

    name: str
    condition: str
    status: str
    cells: dict[str, str]
    """COLUMNS' keys -> text; "–" where the run has no such number"""
    note: str = ""
    """what became of a run that is not done"""


def conditions_table(records: Records) -> Table:
    """The page's tables for the terminal, in 80 columns. `records` is what `find_records` returns."""
    sections = read_sections(records)
    several = len({section.model for section in sections}) > 1
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("run", min_width=10, overflow="fold")
    kinds = {section.by_loss for section in sections}
    score = "score" if len(kinds) > 1 else "held-out loss" if True in kinds else "accuracy, %"
    against = "against all" + (", pp" if True not in kinds else "")
    for title in (score, against, "covered", "trained", "tokens/s"):
        table.add_column(title, justify="right", no_wrap=True)
    keys = ("accuracy", "difference", "covered", "trained", "speed")
    for section in sections:
        for task in section.tasks:
            heading = section.data if task == section.data else f"{section.data} → {task}"
            heading = f"[bold]{escape(one_line(heading))}[/]"
            heading += f" {escape(one_line(section.model))}" if several else ""
            table.add_row(heading + (" (held-out loss)" if len(kinds) > 1 and section.by_loss else ""))
            for row in table_rows(section, task):
                note = f"\n[red]{escape(one_line(row.note))}[/]" if row.note else ""
                cells = (row.cells[key].split(" (")[0].replace(" to ", ", ") for key in keys)
                table.add_row(escape(one_line(row.name)) + note, *cells)
            table.add_section()
    return table


def read_sections(records: Records) -> list[Section]:
    """Groups runs by model and training data. A base run joins every section that it was evaluated for."""
    groups: dict[tuple[str, str], dict[Path, Record]] = {}
    for folder, record in records.items():
        if record["condition"] != "base":
            groups.setdefault((record["model"]["name"], record["data"]["name"]), {})[folder] = record
    for folder, record in records.items():
        if record["condition"] == "base":
            model, own = record["model"]["name"], record["data"]["name"]
            wanted = {own, *part(record, "evaluation")}
            held = part(record, "config").get("test_data")
            of_model = {data: group for (name, data), group in groups.items() if name == model}
            joined = [data for data, group in of_model.items() if data in wanted or _tested_on(group, held)]
            for data in joined or [own]:
                groups.setdefault((model, data), {})[folder] = record
    sections = [
        Section(data, model, dict(sorted(group.items(), key=_order))) for (model, data), group in sorted(groups.items())
    ]
    for section in sections:
        _read_routing(section)
    return sections


def table_rows(section: Section, task: str) -> list[Row]:
    """One row a run: base, all, hot, random, cold, then others."""
    several_seeds = len({record["seed"] for record in section.records.values()}) > 1
    named = {
        folder: f"{record['name']}, seed {record['seed']}" if several_seeds else record["name"]
        for folder, record in section.records.items()
    }
    times = Counter(named.values())
    rows = []
    for folder, record in section.records.items():
        result = part(record, "evaluation").get(task)
        parameters, training = part(record, "parameters"), part(record, "training")
        trained = parameters.get("trainable")
        cells = dict.fromkeys(COLUMNS, NONE)
        if result is not None:
            cells["accuracy"] = _accuracy(result)
        elif section.by_loss and (loss := _test_loss(record)) is not None:
            cells["accuracy"] = f"{loss:.4f}"
        if found := against_all(section, folder, task):
            cells["difference"] = _signed(found[1].difference, 4) if section.by_loss else _points(found[1])
        if (profile := section.profiles.get(folder)) is not None and folder in section.plans:
            cells["covered"] = f"{covered(profile, section.plans[folder]):.1%}"
        if trained:
            percent = parameters.get("percent")
            share = 100 * trained / max(1, parameters["total"]) if percent is None else percent
            cells["trained"] = f"{human_count(trained)} ({share:.{1 if share >= 1 else 2}f}%)"
        for key, value, text in (
            ("adapter", parameters.get("adapter_bytes"), human_bytes),
            ("speed", training.get("tokens_per_second"), lambda value: f"{value:,.0f}"),
            ("memory", training.get("peak_memory_bytes"), human_bytes),
        ):
            if value:
                cells[key] = text(value)
        name = named[folder]
        if times[name] > 1:
            name += f" ({folder.parent.name}/{folder.name})"
        note = _note(record, cells["accuracy"] != NONE)
        rows.append(Row(name, record["condition"], record["status"], cells, note))
    return rows


def against_all(section: Section, folder: Path, task: str) -> tuple[Record, Difference] | None:
    """The run on all experts with this run's seed, and this run's accuracy minus its accuracy; or of the two the
    held-out loss, where the section goes by it.

    With an interval where both kept their results on the same examples, else with nan. None: no such run,
    or one of the two was not evaluated.
    """
    record = section.records[folder]
    if task not in part(record, "evaluation") and not section.by_loss:
        return None
    for other, reference in section.records.items():
        result = part(reference, "evaluation").get(task)
        same = reference["condition"] == "all" and reference["seed"] == record["seed"]
        if not same or other == folder:
            continue
        if section.by_loss and (ours := _test_loss(record)) and (theirs := _test_loss(reference)):
            return reference, Difference(ours - theirs, float("nan"), float("nan"))
        if result is None:
            continue
        a, b = _results(section, folder, task), _results(section, other, task)
        if a and b and [r.get("id") for r in a] == [r.get("id") for r in b]:
            return reference, paired_difference([r["correct"] for r in a], [r["correct"] for r in b])
        difference = record["evaluation"][task]["accuracy"] - result["accuracy"]
        return reference, Difference(difference, float("nan"), float("nan"))
    return None


def covered(profile: RoutingProfile, plan: ExpertPlan) -> float:
    """Share of the profile's assignments that go to the plan's experts, mean over the profile's layers."""
    shares = profile.shares()
    rows = [shares[row, list(plan.experts.get(layer, ()))].sum() for row, layer in enumerate(profile.layers)]
    return float(sum(rows)) / len(rows)


def human_count(number: float) -> str:
    """84967424 -> "85.0M"."""
    return _scaled(number, ("", "K", "M", "B", "T"))


def human_bytes(number: float) -> str:
    """339738624 -> "339.7 MB", in powers of 1000."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def human_flops(number: float) -> str:
    """114e9 -> "114.0 GFLOP"."""
    return _scaled(number, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"))


def human_seconds(number: float | None) -> str:
    """93.1 -> "1 min 33 s"."""
    if number is None:
        return NONE
    if number < 10:
        return f"{number:.1f} s"
    minutes, seconds = divmod(round(number), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _scaled(number: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(number) < 999.95 or (unit == units[0] and abs(number) < 1000):
            return f"{number:,.0f}{unit}" if unit == units[0] else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:,.1f}{units[-1]}"


def _order(item: tuple[Path, Record]) -> tuple[int, str, int, str]:
    folder, record = item
    place = ORDER.index(record["condition"]) if record["condition"] in ORDER else len(ORDER)
    return place, record["name"], record["seed"], str(folder)


def _accuracy(result: Mapping[str, Any]) -> str:
    wilson = proportion_interval(result["correct"], result["n"])
    ends = {"ci_low": wilson.low, "ci_high": wilson.high}  # where the record has none, or null
    low, high = (other if result.get(name) is None else result[name] for name, other in ends.items())
    return f"{100 * result['accuracy']:.1f} [{100 * low:.1f}–{100 * high:.1f}]"


def _points(difference: Difference) -> str:
    point, low, high = (_signed(100 * value, 1) for value in difference)
    return f"{point} [{low} to {high}]" if difference.low == difference.low else point  # nan: no interval


def _tested_on(group: Records, data: str | None) -> bool:
    tested = (part(record, "config").get("test_data") for record in group.values())
    return data is not None and data in tested


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def part(record: Record, name: str) -> Mapping[str, Any]:
    """A section of a record; empty where it has none."""
    return record.get(name) or {}


def _test_loss(record: Record) -> float | None:
    loss: float | None = part(record, "training").get("test_loss")
    return loss


def _note(record: Record, has_score: bool) -> str:
    if record["status"] == "failed":
        return f"failed: {record['error']}" if record.get("error") else "failed"
    if record["status"] == "running":
        return "not finished"
    return "" if has_score else "not evaluated"


def _results(section: Section, folder: Path, task: str) -> list[dict[str, Any]] | None:
    """One dict an example, with `id` and `correct`; None where the file is gone or broken, which is noted."""
    name = section.records[folder]["evaluation"][task].get("results")
    path = folder / name if name else None
    if not path or not path.is_file():
        return None
    try:
        return read_results(path)
    except FileError as error:
        section.note(f"{section.records[folder]['name']}: its results are left out: {error}")
        return None


def _read_routing(section: Section) -> None:
    """Reads each run's plan, and the profile and plan to draw: the first hot run's, else any run's."""
    runs = sorted(section.records.items(), key=lambda item: item[1]["condition"] != "hot")  # stable
    loaded: dict[Path, RoutingProfile] = {}
    for folder, record in runs:
        for kind in ("profile", "plan"):
            if not record.get(kind):
                continue
            path = folder / record[kind]["path"]
            if not path.is_file():
                section.note(f"{record['name']}: its {kind} {record[kind]['path']} is gone.")
                continue
            try:
                if kind == "plan":
                    section.plans[folder] = ExpertPlan.load(path)
                else:
                    place = path.resolve()
                    loaded[place] = section.profiles[folder] = loaded.get(place) or RoutingProfile.load(path)
                    section.profile = section.profile or section.profiles[folder]
            except HotLoraError as error:
                section.note(f"{record['name']}: its {kind} is left out: {error}")
        if section.plan is None and record["condition"] == "hot":
            section.plan = section.plans.get(folder)
    # A run that was given a plan has no profile of its own: the one that the plan was made of, if it is here.
    by_hash = {profile.hash: profile for profile in loaded.values()}
    for folder, plan in list(section.plans.items()):
        if folder not in section.profiles and plan.profile_hash in by_hash:
            section.profiles[folder] = by_hash[plan.profile_hash]
        if section.profile is not None and plan.num_experts != section.profile.num_experts:
            section.note(
                f"{folder}: its plan is left out: it is for {plan.num_experts} experts a layer, but the profile of "
                f"{section.model} has {section.profile.num_experts}: keep different models' runs apart."
            )
            del section.plans[folder]
            section.plan = None if section.plan is plan else section.plan
