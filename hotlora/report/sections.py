"""Run records -> a report's sections: the runs on one data set and model, with profile and plans. Loads no model."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..base.errors import HotLoraError
from ..base.records import Record
from ..routing.plan import ExpertPlan
from ..routing.profile import RoutingProfile
from ..runs.options import RunOptions
from ..training.identity import FREE_OPTIONS

ORDER = ("base", "all", "hot", "random", "cold")

Records = Mapping[Path, Record]

# A record made before there was an option has its default.
_DEFAULTS = {option.name: option.default for option in fields(RunOptions)}
# What a report shows elsewhere: which experts, on what, with which seed, what is adapted beside experts.
_SHOWN_ELSEWHERE = {
    *FREE_OPTIONS, "rule", "fraction", "experts_per_layer", "scores", "plan", "profile", "plan_seed", "seed", "model",
    "data", "test_data", "condition", "train_attention", "train_router", "a_seed", "adapter", "examples", "device",
    "examples_per_step", "eval_batch_size",
}  # fmt: skip


@dataclass
class Section:
    """The runs on one data set and one model, with the profile and plans that their files hold.

    Attributes:
        profile, plan: what pictures show; `plan_of` and `profile_of` are the folders of the runs that have them.
        plans, profiles: of each run.
        notes: what was left out, in words.
    """

    data: str
    model: str
    records: dict[Path, Record]
    profile: RoutingProfile | None = None
    profile_of: Path | None = None
    plan: ExpertPlan | None = None
    plan_of: Path | None = None
    plans: dict[Path, ExpertPlan] = field(default_factory=dict)
    profiles: dict[Path, RoutingProfile] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def by_loss(self) -> bool:
        """Whether the held-out loss stands for a score: no run was scored on a task."""
        records = self.records.values()
        return not any(record.get("evaluation") for record in records) and any(map(held_out_loss, records))

    @property
    def tested_apart(self) -> bool:
        """Whether the held-out losses are of different rows: then none is more or less than another."""
        return len({tested_on(record) for record in self.records.values() if held_out_loss(record) is not None}) > 1

    def note(self, text: str) -> None:
        """Remembers what was left out, once."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def tasks(self) -> list[str]:
        """What the runs were evaluated on, the training data's own task first."""
        names = {name for record in self.records.values() for name in part(record, "evaluation")}
        return sorted(names, key=lambda name: (name != self.data, name)) or [self.data]

    @property
    def groups(self) -> dict[str, list[Path]]:
        """What is adapted -> runs, which share a table; the model before training is in each."""
        trained = {folder: adapted(record) for folder, record in self.records.items() if is_trained(record)}
        names = sorted(set(trained.values()), key=lambda name: (-len(name), name)) or [""]
        return {name: [folder for folder in self.records if trained.get(folder, name) == name] for name in names}


def place_of(name: str) -> str:
    """The same for all names of a model: an adapter notes its base's folder from the root, a training as it was
    given."""
    return os.path.abspath(os.path.expanduser(name))


def read_sections(records: Records) -> list[Section]:
    """Groups runs by model and training data. A base run joins every section that it was evaluated for."""
    groups: dict[tuple[str, str], dict[Path, Record]] = {}
    called: dict[str, str] = {}

    def one_name(name: str) -> str:
        return called.setdefault(place_of(name), name)

    for folder, record in records.items():
        if record["condition"] != "base":
            groups.setdefault((one_name(model_name(record)), record["data"]["name"]), {})[folder] = record
    for folder, record in records.items():
        if record["condition"] == "base":
            model, own = one_name(record["model"]["name"]), record["data"]["name"]
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


def is_trained(record: Record) -> bool:
    """Whether the run is a training, and not the model as it is."""
    return record["condition"] != "base" and "adapter" not in part(record, "config")


def adapted(record: Record) -> str:
    """What a run trains: "attention, router and experts", or less."""
    config = part(record, "config")
    beside = [name for name in ("attention", "router") if config.get(f"train_{name}", True)]
    return f"{', '.join(beside)} and experts" if beside else "experts alone"


def differing(records: Iterable[Record]) -> list[str]:
    """Options in which trainings differ, in a run's order of them; the learning rate always, where one has it."""
    configs = [part(record, "config") for record in records if is_trained(record)]
    names = [name for name in dict.fromkeys([*_DEFAULTS, *(name for config in configs for name in config)])]
    names = [name for name in names if name not in _SHOWN_ELSEWHERE and not name.endswith("_hash")]
    found = [name for name in names if len({json.dumps(_value(config, name)) for config in configs}) > 1]
    rate = "learning_rate"
    has_rate = any(config.get(rate) is not None for config in configs)
    return [rate, *(name for name in found if name != rate)] if has_rate else found


def option_text(record: Record, name: str) -> str:
    """A run's value of an option, for a table's cell."""
    value = _value(part(record, "config"), name)
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(Path(str(item.get("path", item) if isinstance(item, dict) else item)).name for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def distance(a: Record, b: Record) -> tuple[bool, int]:
    """How far two runs' options are from each other, beside which experts they adapt."""
    return adapted(a) != adapted(b), len(differing([a, b]))


def same_options(a: Record, b: Record) -> bool:
    """Whether two runs differ in which experts they adapt alone, and not in how."""
    return adapted(a) == adapted(b) and all(option_text(a, name) == option_text(b, name) for name in differing([a, b]))


def part(record: Record, name: str) -> Mapping[str, Any]:
    """A section of a record; empty where it has none."""
    return record.get(name) or {}


def model_name(record: Record) -> str:
    """What a run is of: the name of its model, or of the one whose full fine-tuning it scores."""
    name: str = part(record, "sweep").get("model") or record["model"]["name"]
    return name


def held_out_loss(record: Record) -> float | None:
    """The held-out loss after training."""
    loss: float | None = part(record, "training").get("test_loss")
    return loss


def tested_on(record: Record) -> str | None:
    """The hash of the rows that its held-out loss is of; None where the record has none."""
    found: str | None = part(record, "config").get("test_hash")
    return found


def held_out_rows(record: Record) -> str:
    """How many rows its held-out loss is of, and whence: "20 of held.jsonl"."""
    config = part(record, "config")
    name, share = config.get("test_data"), config.get("test_split")
    source = f" of {Path(name).name}" if name else f" of test split {share:g}" if share else ""
    return f"{part(record, 'data').get('test', 0):,}{source}"


def _value(config: Mapping[str, Any], name: str) -> Any:
    value = config.get(name, _DEFAULTS.get(name))
    return list(value) if isinstance(value, tuple) else value


def _order(item: tuple[Path, Record]) -> tuple[int, str, int, str]:
    folder, record = item
    place = ORDER.index(record["condition"]) if record["condition"] in ORDER else len(ORDER)
    return place, record["name"], record["seed"], str(folder)


def _tested_on(group: Records, data: str | None) -> bool:
    tested = (part(record, "config").get("test_data") for record in group.values())
    return data is not None and data in tested


def _read_routing(section: Section) -> None:
    """Reads each run's plan, and the profile and plan to draw: the first hot run's, else the first that chose."""
    runs = sorted(  # stable
        section.records.items(), key=lambda item: (item[1]["condition"] != "hot", item[1]["condition"] == "all")
    )
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
                    continue
                place = path.resolve()
                loaded[place] = section.profiles[folder] = loaded.get(place) or RoutingProfile.load(path)
                if section.profile is None:
                    section.profile, section.profile_of = section.profiles[folder], folder
            except HotLoraError as error:
                section.note(f"{record['name']}: its {kind} is left out: {error}")
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
    section.plan_of = next((folder for folder, plan in section.plans.items() if plan.rule != "all"), None)
    section.plan = section.plans.get(section.plan_of) if section.plan_of else None
