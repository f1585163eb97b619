"""Runs some tests with the newest packages that pyproject.toml allows, in a minute or two.

python scripts/newest.py    # in the environment of `make test`, whose packages are used where there is no newer one

torch stays as it is, for it is gigabytes: `make test-matrix` has the newest torch, and all of the tests. Where no newer
packages are within reach nothing is tested, and that is said.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NEWER = ROOT / ".venv-smoke"
FAMILIES = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoehybrid", "gemma4_text")
OF_A_FAMILY = (
    "test_profile_and_zero_B", "test_output_and_every_gradient_equal_plain_code",
    "test_save_load_merge_switch_and_disable", "test_gradient_checkpointing_changes_nothing",
)  # fmt: skip
TESTS = [
    *(f"tests/test_families.py::{test}[{family}]" for test in OF_A_FAMILY for family in FAMILIES),
    "tests/test_peft_hooks.py",
    "tests/test_train.py::test_training_lowers_the_loss_and_moves_only_the_adapter",
    "tests/test_trainers.py",
    "tests/test_cli.py::test_the_stages_one_by_one",
]


def main() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    held = f"torch=={importlib.metadata.version('torch')}"
    found = pip("--dry-run", "--upgrade", "--upgrade-strategy", "eager", "--report", "-", *requirements, held)
    newer = [f"{item['metadata']['name']}=={item['metadata']['version']}" for item in json.loads(found)["install"]]
    if not newer:
        skip("no package is newer than those of constraints.txt")
    shutil.rmtree(NEWER, ignore_errors=True)
    pip("--no-deps", "--target", str(NEWER), *newer)
    print("newest packages:", *sorted(newer), flush=True)
    paths = os.pathsep.join(filter(None, [str(NEWER), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", *TESTS]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}).returncode)


def pip(*arguments: str) -> str:
    """What `pip install` prints. Ends the process, with success, where pip fails: as a rule, no network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        skip(f"pip: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def skip(reason: str) -> None:
    print(f"{' newest packages ':=^120}\nskipped: {reason}\n{'=' * 120}", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
