"""Every number that MoE-Sieve prints, beside the same number from its published data.

One reading for a whole table: deviations with ddof 0, tests paired by seed. A cell that does not come out by it is
explained in `moe_sieve_cell.EXPLAINED`, or by the table's other reading, which then must give the printed digits.
"""

import moe_sieve_counts as counts
import moe_sieve_trainings as trainings
from moe_sieve_cell import Cell
from moe_sieve_data import Data

from hotlora.report.published import MODELS
from hotlora.routing.study import study


def cells(data: Data) -> list[Cell]:
    """All, in the paper's order; those that these data do not have are absent."""
    studies = {
        model: study(of, shared=MODELS[model]["shared"]) for model, of in data.profiles.items() if model in MODELS
    }
    made = [
        counts.models(data), counts.skew(studies), counts.figure_1(studies), counts.figure_2(studies),
        counts.section_3_2(data, studies), counts.figure_3(studies), counts.section_3_3(studies),
        trainings.table_3(data), trainings.table_4(), trainings.section_6_1(data), trainings.table_5(data),
        trainings.section_6_2(data), trainings.table_6(data), trainings.section_7_2(data), counts.table_7(studies),
        counts.figure_5(studies), trainings.table_8(data), counts.table_9(data), trainings.table_10(data),
    ]  # fmt: skip
    return [cell for part in made for cell in part]
