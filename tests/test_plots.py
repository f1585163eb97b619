"""`hotlora.plots`: matplotlib figures that a notebook shows and `savefig` writes."""

import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import hotlora
from hotlora import plots
from hotlora.base.errors import DataError, FileError
from hotlora.base.records import new_record, write_record

COUNTS = torch.arange(1, 33).view(4, 8)
PROFILE = hotlora.RoutingProfile((0, 1, 2, 3), COUNTS, COUNTS.double(), 66, 2)
PLAN = hotlora.select_experts(PROFILE, experts_per_layer=2)


def folder(path: Path, name: str = "hot 25%") -> Path:
    model, data = {"name": "nano", "fingerprint": ""}, {"name": "t", "hash": "", "train": 1, "test": 0}
    write_record(path, new_record(name=name, condition="hot", model=model, data=data))
    rows = [{"step": step, "loss": None if step == 2 else 1 / step} for step in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", plots.__all__)
def test_each_gives_a_figure_that_shows_itself(name: str, tmp_path: Path):
    arguments = {
        "heat_map": (PROFILE, PLAN), "sorted_load": (PROFILE, PLAN), "coverage_curve": (PROFILE, 2),
        "heat_maps": ({"a": PROFILE, "b": PROFILE},), "coverage_curves": ({"a": PROFILE, "b": PROFILE}, 2),
        "loss_curves": (folder(tmp_path / "a"), hotlora.Run(folder(tmp_path / "b", "$x$"))),
    }  # fmt: skip
    figure = getattr(plots, name)(*arguments[name])
    assert isinstance(figure, Figure) and figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG")
    figure.savefig(tmp_path / "x.svg")
    assert (tmp_path / "x.svg").stat().st_size > 1000


def test_losses_are_those_of_the_metrics(tmp_path: Path):
    figure = plots.loss_curves(folder(tmp_path / "a"))
    line = figure.axes[0].lines[-1]
    assert list(line.get_xdata()) == [1, 3] and list(line.get_ydata()) == pytest.approx([1, 1 / 3])
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["hot 25%"]


def test_no_runs(tmp_path: Path):
    with pytest.raises(DataError, match="no runs to draw"):
        plots.loss_curves()
    with pytest.raises(FileError, match=r"run\.json"):
        plots.loss_curves(tmp_path)
