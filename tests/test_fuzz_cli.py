"""Every command with random arguments. HOTLORA_FUZZ=200 gives each so many, drawn anew."""

import os

import fuzz_cli
import pytest
from hypothesis import HealthCheck, given, settings

COUNT = int(os.environ.get("HOTLORA_FUZZ", "0"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> fuzz_cli.Bench:
    folder = tmp_path_factory.mktemp("fuzz-cli")
    return fuzz_cli.Bench(folder / "inputs", folder / "work")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    "words",
    [
        ["export", "--model", "{model}", "{adapter}", "-o", "out", "-f", "peft", "--device", "\n"],
        ["export", "--model", "{model}", "{adapter}", "-o", "a" * 300, "-f", "peft"],
        ["plan", "{profile}", "-o", "/dev/null/x"],
        ["params", "{rows}"],
        ["plan", "{profile}", "-o", "out", "--rule", "random", "--seed", str(2**63)],
        ["bench", "--rounds", "1", "--seed", str(2**63)],
        ["train", "--model", "{model}", "--data", "{rows}", "-o", "out", "--no-evaluate", "--seed", str(2**32)],
        ["train", "--model", "{model}", "--data", "{rows}", "-o", "out", "--max-steps", "1", "--report-to", "x"],
        ["train", "--model", "{model}", "--data", "{rows}", "-o", "out", "--max-steps", "1", "--report-to", "dvclive"],
    ],
)
def test_what_was_found_ends_with_one_message(bench: fuzz_cli.Bench, words: list[str]):
    assert bench.run(words) == 1


def test_what_was_found_and_works_now(bench: fuzz_cli.Bench):
    assert bench.run(["profile", "--model", "{model}", "--data", "{rows}", "--limit", "3", "--dtype", "float64"]) == 0


@pytest.mark.parametrize("command", fuzz_cli.COMMANDS)
def test_a_command_ends_well_or_with_one_message(bench: fuzz_cli.Bench, command: str):
    codes = {0: 0, 1: 0, 2: 0}

    @settings(
        max_examples=COUNT or 6, deadline=None, derandomize=not COUNT, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(fuzz_cli.arguments(command))
    def check(words: list[str]) -> None:
        codes[bench.run(words)] += 1

    check()
    assert codes[1] or codes[2], "nothing was refused: are the words random at all?"
