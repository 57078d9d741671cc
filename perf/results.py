"""What a run yields: one file of JSON, and the statistics over it.

Systems are compared inside a repeat, where they ran within seconds of each other, and the ratios of the
repeats are summed up by their median: what changes slowly on the machine cancels out."""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

BASELINE = "vxlan"
"""The system that ratios refer to."""
VERSION = 1
"""Of the file's layout."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Plan(_Record):
    """What was asked for; `settings` are the appliance's, as `section.key=value`."""

    systems: tuple[str, ...]
    scenarios: tuple[str, ...]
    repeats: int
    seconds: int
    settings: tuple[str, ...] = ()


class Sample(_Record):
    """One scenario on one system, once: its values, or why there are none."""

    scenario: str
    system: str
    repeat: int
    values: dict[str, float] = {}
    error: str = ""


class Memory(_Record):
    """What a process of a system held at the end: PSS, its share of pages that others use too."""

    system: str
    node: str
    role: str
    pss_mib: float


class Result(_Record):
    """A whole run."""

    version: int = VERSION
    started: datetime
    command: str
    machine: dict[str, Any]
    systems: dict[str, Any]
    plan: Plan
    samples: tuple[Sample, ...]
    memory: tuple[Memory, ...]

    def save(self, path: Path) -> None:
        """Writes the file. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.model_dump_json(indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Result":
        """Reads a file. Raises OSError, pydantic.ValidationError."""
        return cls.model_validate_json(path.read_bytes())

    def values(self, scenario: str, system: str, metric: str) -> dict[int, float]:
        """A metric by repeat; a sample that failed is not there."""
        return {
            sample.repeat: sample.values[metric]
            for sample in self.samples
            if (sample.scenario, sample.system) == (scenario, system) and metric in sample.values
        }

    def spread(self, scenario: str, system: str, metric: str) -> "Spread | None":
        """A metric over the repeats, None without any."""
        return spread(self.values(scenario, system, metric).values())

    def ratio(self, scenario: str, system: str, metric: str) -> "Spread | None":
        """A metric relative to the baseline's of the same repeat, None without a pair."""
        return spread(self.ratios(scenario, system, metric).values())

    def ratios(self, scenario: str, system: str, metric: str) -> dict[int, float]:
        """A metric relative to the baseline's of the same repeat, by repeat."""
        base = self.values(scenario, BASELINE, metric)
        own = self.values(scenario, system, metric)
        return {repeat: own[repeat] / base[repeat] for repeat in own if base.get(repeat)}

    def failures(self) -> list[Sample]:
        """Samples without values."""
        return [sample for sample in self.samples if sample.error]


class Spread(NamedTuple):
    """Median, least and most."""

    median: float
    low: float
    high: float


def spread(values: Iterable[float]) -> Spread | None:
    """Sums values up, None if there are none."""
    ordered = sorted(values)
    return Spread(median(ordered), ordered[0], ordered[-1]) if ordered else None
