"""Pictures of routing and of training, as matplotlib figures.

hotlora.plots.heat_map(profile, plan)                    # shown in a notebook
hotlora.plots.heat_map(profile, plan).savefig("x.png")   # anywhere
"""

from pathlib import Path

from .base.errors import DataError
from .report.figures import Curve, Figure, coverage_curve, heat_map, sorted_load
from .report.figures import loss_curves as _loss_curves
from .report.study_figures import coverage_curves, heat_maps
from .runs.load import Run

__all__ = ["coverage_curve", "coverage_curves", "heat_map", "heat_maps", "loss_curves", "sorted_load"]


def loss_curves(*runs: Run | str | Path) -> Figure:
    """Training loss by optimizer step, with held-out losses as dots, of some runs (of `hotlora.train`, or folders).

    DataError: no runs. FileError: a folder without a run, or a run without its metrics.
    """
    if not runs:
        raise DataError("there are no runs to draw: give what hotlora.train returned, or runs' folders.")
    curves = []
    for run in (run if isinstance(run, Run) else Run(run) for run in runs):
        rows = run.metrics
        training, held_out = (
            {row["step"]: row[name] for row in rows if row.get(name) is not None} for name in ("loss", "eval_loss")
        )
        curves.append(Curve(run.record["name"], run.record["condition"], training, held_out))
    return _loss_curves(curves)
