"""The preregistered studies' tables, on records with what they should find."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hotlora.base.records import new_record
from hotlora.papers.studies import STUDIES

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import preregistered

    return preregistered


def write(folder: Path, study: str, value, chance: int = 0) -> None:
    """Records of the study's own conditions and seeds. value: (condition, seed, generator) -> points, loss."""
    sweep, generator = STUDIES[study](), np.random.default_rng(chance)
    for condition in sweep.conditions:
        for seed in sweep.seeds:
            score, loss = value(condition.name, seed, generator)
            result = {"metric": "exact_match", "accuracy": score / 100, "n": 500, "correct": 5 * score}
            record = new_record(
                name="a run", condition=condition.name, model={"name": "nano", "fingerprint": "f"}, seed=seed,
                data={"name": "task"}, evaluation={"task": result},
                sweep={"name": study, "condition": condition.name},
            ) | {"status": "done", "started": "2026-11-28T01:02"}  # fmt: skip
            if condition.scores is None:
                record["training"] = {"test_loss": loss}
            run = folder / condition.name / f"seed{seed}"
            run.mkdir(parents=True)
            (run / "run.json").write_text(json.dumps(record), encoding="utf-8")


def test_quantized(tmp_path: Path, script):
    def value(condition: str, seed: int, generator):
        lost = 5 if condition == "nano-sql/4-bit" else 0
        return (50 if "choice" in condition else 90 + generator.normal() / 4 - lost), 0.1

    write(tmp_path, "quantized", value)
    text = script.quantized(tmp_path)
    assert "Scores: 11 of 18 are equivalent within 2 points; in 6 all differences are equal" in text
    row = next(line for line in text.splitlines() if line.startswith("| nano-sql | 4 bits |"))
    assert "cannot tell" in row and text.count("all differences are equal") == 1 + 6
    assert len(text.splitlines()) == 4 + 3 * 7
    assert script.seeds(tmp_path) == "8 seeds a condition, the first begun 2026-11-28 01:02 UTC."


def test_learned(tmp_path: Path, script):
    values: dict[tuple[str, int], float] = {}

    def value(condition: str, seed: int, generator):
        better = 0.02 if condition == "nano-math/dr-lora" else 0
        values[condition, seed] = 0.05 + generator.normal() / 1000 - better
        return 95 + generator.normal() / 4, values[condition, seed]

    write(tmp_path, "learned", value)
    text = script.learned(tmp_path)
    better = "dr-lora than static on nano-math; dr-lora than static-longer on nano-math"
    assert text.startswith(f"Lower held-out loss: {better}. Scores: 15 of 15")
    ours, theirs = ([values[f"nano-math/{name}", seed] for seed in range(8)] for name in ("dr-lora", "static"))
    expected = stats.ttest_rel(ours, theirs)
    interval = expected.confidence_interval()
    row = next(line for line in text.splitlines() if line.startswith("| nano-math | dr-lora − static |"))
    assert f"{np.mean(ours) - np.mean(theirs):+.4f} [{interval.low:.4f}, {interval.high:.4f}]" in row
    write(tmp_path / "none", "learned", lambda *of: (95, 0.05 + of[2].normal() / 1000), chance=1)
    assert script.learned(tmp_path / "none").startswith("None beats static")


def test_cold_noise(tmp_path: Path, script):
    values: dict[tuple[str, int], float] = {}

    def value(condition: str, seed: int, generator):
        values[condition, seed] = 60 + generator.normal() * (9 if condition == "0.25/half" else 1)
        return values[condition, seed], 0.3 + generator.normal() / 100

    write(tmp_path, "cold_noise", value)
    text = script.cold_noise(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("| a quarter | half |")]
    assert len(rows) == 2 and text.count("\n| a") + text.count("\n| half") == 2 * 6
    sds = [np.std([values[f"0.25/{name}", seed] for seed in range(16)], ddof=1) for name in ("half", "hot")]
    assert f"| {sds[0] / sds[1]:.2f} [" in rows[0]
    differences = [[values[f"{s}/{k}", n] for n in range(16)] for s in script.SHARES for k in ("half", "random")]
    hot = [[values[f"{s}/hot", n] for n in range(16)] for s in script.SHARES for _ in range(2)]
    least = min(stats.ttest_rel(a, b).pvalue for a, b in zip(differences, hot, strict=True))
    assert f"| {min(1, 6 * least):.3f} |" in text
