"""The campaign of faults, in short: kills, damage and forgeries lose nothing and let nothing in."""

from __future__ import annotations

import sys
from collections import Counter

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    import faults

    return faults.prepare(tmp_path_factory.mktemp("ground"))


def test_kills_lose_nothing(ground):
    import faults

    counts = {}
    assert faults.kill(ground, 8, seed=5, progress=counts.update) == []
    assert sum(count for name, count in counts.items() if name.startswith("kills")) >= 8


def test_damage_is_refused_or_does_not_matter(ground):
    import faults

    kinds = Counter()
    faults.damage(ground, 300, seed_=1, kinds=kinds)
    assert sum(kinds.values()) >= 300
    assert {kind.split(": ")[1] for kind in kinds} == {"refused", "exact"}


def test_forgeries_are_refused_or_do_no_harm(ground):
    import forgeries

    kinds = Counter()
    assert forgeries.forgeries(ground, 60, seed=2, kinds=kinds) == []
    assert {kind.split(": ")[1] for kind in kinds} == {"refused", "done"}
