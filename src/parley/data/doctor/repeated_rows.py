"""Which rows repeat others: in one source, and between the training rows and the held-out ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from parley.data.doctor import checks
from parley.data.doctor.checks import Check
from parley.data.doctor.duplicates import Fingerprints, near_repeats, repeats
from parley.data.doctor.examine import Doctor
from parley.data.doctor.findings import Finding

SHARED = frozenset({checks.HELDOUT.name, checks.NEAR_HELDOUT.name})
"""The checks of held-out rows against training rows."""


def find_repeated(doctor: Doctor) -> None:
    """Count rows that repeat an earlier one."""
    prints = doctor.fingerprints
    everything = np.ones(len(prints), dtype=bool)
    exact = repeats(prints.exact(), everything, everything)
    single = everything.copy()
    single[list(exact)] = False
    near = near_repeats(prints.signatures(), single, single)
    rows = Side.of(doctor)
    for check, pairs in ((checks.DUPLICATE, exact), (checks.NEAR_DUPLICATE, near)):
        for target, source in sorted(pairs.items()):
            doctor.find(check, rows.numbers[target], f"the first repeats {rows.origin(source)}")


@dataclass(frozen=True)
class Side:
    """Training rows or held-out rows: fingerprints, and the numbers of their rows in the source that `doctor` read."""

    doctor: Doctor
    prints: Fingerprints
    numbers: list[int]

    @classmethod
    def of(cls, doctor: Doctor) -> Side:
        return cls(doctor, doctor.fingerprints, doctor.fingerprinted.tolist())

    def origin(self, index: int) -> str:
        return self.doctor.origins[self.numbers[index]]


def sides(doctor: Doctor, heldout: Doctor | None) -> tuple[Side, Side]:
    """Training rows and held-out rows: of two sources, or of one whose held-out rows are `doctor.heldout`."""
    if heldout is not None:
        return Side.of(doctor), Side.of(heldout)
    numbers = np.array(doctor.fingerprinted, dtype=np.int64)
    is_heldout = np.isin(numbers, list(doctor.heldout))
    train, held = (
        Side(doctor, doctor.fingerprints.select(mask), numbers[mask].tolist()) for mask in (~is_heldout, is_heldout)
    )
    return train, held


def find_shared(train: Side, heldout: Side) -> list[Finding]:
    """Held-out rows that repeat a training row."""
    found: dict[str, Finding] = {}
    for check, pairs in _shared(train.prints, heldout.prints):
        for target, source in sorted(pairs.items()):
            finding = found.setdefault(check.name, Finding.of(check))
            finding.add(heldout.origin(target - len(train.prints)), f"the first repeats {train.origin(source)}")
    for finding in found.values():
        finding.share = finding.rows.count / len(heldout.prints)
    return list(found.values())


def flag_shared(train: Side, heldout: Side) -> None:
    """Flag the training rows that repeat a held-out one."""
    flagged = train.doctor.flagged
    for check, pairs in _shared(heldout.prints, train.prints):
        if check.name in flagged:
            flagged[check.name].update(train.numbers[target - len(heldout.prints)] for target in pairs)


def _shared(first: Fingerprints, second: Fingerprints) -> Iterator[tuple[Check, dict[int, int]]]:
    """Rows of `second` that repeat one of `first`, exactly and nearly; numbers of `second` follow those of `first`."""
    both = first.extend(second)
    sources = np.arange(len(both)) < len(first)
    exact = repeats(both.exact(), sources, ~sources)
    yield checks.HELDOUT, exact
    others = ~sources
    others[list(exact)] = False
    yield checks.NEAR_HELDOUT, near_repeats(both.signatures(), sources, others)
