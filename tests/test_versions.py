"""pyproject.toml's ranges, beside the versions that they are tested with."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = [Requirement(line) for line in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quantize"])]


def pins(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text("utf-8").splitlines() if line and not line.startswith("#")]
    return {name.lower(): Version(version) for name, version in (line.split("==") for line in lines)}


def floor(requirement: Requirement) -> Version:
    (lowest,) = [part.version for part in requirement.specifier if part.operator == ">="]
    return Version(lowest)


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_allowed():
    floors = {requirement.name.lower(): floor(requirement) for requirement in REQUIREMENTS}
    assert pins("constraints-oldest.txt") == floors


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_the_pinned_versions_are_allowed(requirement):
    assert requirement.specifier.contains(pins("constraints.txt")[requirement.name.lower()])


@pytest.mark.parametrize("name", ["peft", "trl"])
def test_of_what_is_overridden_one_minor_is_allowed(name):
    """What hotlora replaces and overrides there is internal: the next minor may have it otherwise."""
    (requirement,) = [r for r in REQUIREMENTS if r.name == name]
    pinned = pins("constraints.txt")[name]
    allowed = requirement.specifier
    assert floor(requirement).release[:2] == pinned.release[:2]
    assert allowed.contains(f"{pinned.major}.{pinned.minor}.99")
    assert not allowed.contains(f"{pinned.major}.{pinned.minor + 1}")
