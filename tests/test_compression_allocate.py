"""Assignments against all that there are, and the rules that say them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.compression import allocate as allocation
from lepton_jax.compression.allocate import allocate, rules_of
from lepton_jax.compression.rules import assign
from lepton_jax.compression.scheme import Scheme


def totals(losses, sizes, chosen):
    lines = np.arange(len(chosen))
    return losses[lines, chosen].sum(), sizes[lines, chosen].sum()


@st.composite
def problems(draw):
    weights, candidates = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    numbers = st.integers(0, 60)
    grid = [[draw(numbers) for _ in range(candidates)] for _ in range(weights)]
    losses = np.array(grid) / 7
    sizes = np.array([[draw(numbers) for _ in range(candidates)] for _ in range(weights)])
    return losses, sizes


def every(losses, sizes):
    choices = itertools.product(*[range(losses.shape[1])] * len(losses))
    return [totals(losses, sizes, list(chosen)) for chosen in choices]


@given(problems(), st.floats(0, 1))
def test_the_least_loss_within_bytes_is_that_of_trying_all(problem, share):
    losses, sizes = problem
    least, most = sizes.min(1).sum(), sizes.max(1).sum()
    budget = least + share * (most - least)
    loss, size = totals(losses, sizes, allocate(losses, sizes, most_bytes=budget))
    assert size <= budget
    assert loss == pytest.approx(min(a for a, b in every(losses, sizes) if b <= budget))


@given(problems(), st.floats(0, 1))
def test_the_least_bytes_within_a_loss_are_those_of_trying_all(problem, share):
    losses, sizes = problem
    least, most = losses.min(1).sum(), losses.max(1).sum()
    budget = least + share * (most - least) + 1e-9
    loss, size = totals(losses, sizes, allocate(losses, sizes, most_loss=budget))
    assert loss <= budget
    assert size == min(b for a, b in every(losses, sizes) if a <= budget)


def test_large_sizes_are_counted_in_units_and_still_fit(monkeypatch):
    monkeypatch.setattr(allocation, "_UNITS", 50)
    rng = np.random.default_rng(0)
    sizes = np.sort(rng.integers(10**8, 10**9, (6, 3)), axis=1)
    losses = np.sort(rng.random((6, 3)), axis=1)[:, ::-1]
    budget = int(sizes.min(1).sum() * 1.7)
    loss, size = totals(losses, sizes, allocate(losses, sizes, most_bytes=budget))
    exact = min(a for a, b in every(losses, sizes) if b <= budget)
    assert size <= budget and exact <= loss < 1.2 * exact


def test_budgets_that_nothing_fits_are_refused_with_the_least():
    losses, sizes = np.array([[0.5, 0.1], [0.3, 0.2]]), np.array([[4, 8], [5, 9]])
    with pytest.raises(ValueError, match="8 bytes: the smallest that these candidates allow is 9"):
        allocate(losses, sizes, most_bytes=8)
    with pytest.raises(ValueError, match="predicted to lose is 0.3; raise compression.auto_kl"):
        allocate(losses, sizes, most_loss=0.2)


def test_rules_say_what_was_chosen():
    four, eight = Scheme("int4", group=32), Scheme()
    chosen = {
        "embed": eight,
        "layers.0.down": eight,
        "layers.1.down": four,
        "layers.10.down": eight,
        "layers.1.qkv": four,
    }
    rules = rules_of(list(chosen), list(chosen.values()))
    assert [rule.pattern for rule in rules] == [
        r"embed|layers\.(0|10)\.down",
        r"layers\.(1)\.down|layers\.(1)\.qkv",
    ]
    assert assign(rules, chosen) == chosen
