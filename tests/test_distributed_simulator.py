"""The real balancer on machines that don't exist: near T/m, better than fixed splits, none lost."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lepton_jax.distributed.simulator import (
    POLICIES,
    Simulation,
    Work,
    compare,
    heavy_tailed,
    with_stragglers,
)


def test_one_machine_by_hand():
    rows = [Work("a", 4, 4), Work("b", 2, 2)]
    # Two rows on two slots: 1/2 token a second each; alone a row takes 0.8 of a full step.
    seconds = Simulation(rows, [1.0], slots=2).run(alone=6).seconds
    assert seconds == pytest.approx(2 * 2 + 2 * 2 * 0.8)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_none_is_lost_and_none_twice_whoever_dies(seed):
    draw = random.Random(seed)
    machines = draw.randint(2, 9)
    rows = heavy_tailed(draw.randint(1, 150), seed=seed, prefixes=draw.choice([0, 5]))
    speeds = with_stragglers(machines, seed=seed, share=0.3, slow=0.1)
    dying = draw.sample(range(machines), draw.randrange(machines))
    deaths = {n: draw.expovariate(1 / 3000) for n in dying}
    simulation = Simulation(
        rows, speeds, slots=draw.randint(1, 8), deaths=deaths, shared=draw.choice([0, 50])
    )
    outcome = simulation.run()
    assert set(outcome.answers.values()) == {1}


@pytest.mark.parametrize("replicas", [2, 16])
def test_near_the_ideal_and_better_than_a_fixed_split(replicas):
    shares = compare(replicas, rows_each=300)
    assert shares["balanced"] >= 0.95
    assert shares["balanced"] > max(shares["round_robin"], shares["static"])


def test_rows_that_begin_alike_stay_together_at_no_cost():
    rows = heavy_tailed(4000, seed=1, prefixes=40)
    speeds = [1.0] * 8
    alone = sum(row.tokens for row in rows)
    apart = Simulation(rows, speeds, policy="round_robin", shared=100).run(alone=alone)
    together = Simulation(rows, speeds, shared=100).run(alone=alone)
    assert together.prefixes_computed < apart.prefixes_computed / 2
    assert together.of_ideal >= 0.95


def test_a_death_costs_its_share_and_no_row():
    rows = heavy_tailed(2400, seed=2)
    alone = sum(row.tokens for row in rows)
    whole = Simulation(rows, [1.0] * 8).run(alone=alone)
    dead = Simulation(rows, [1.0] * 8, deaths={3: whole.seconds / 2}).run(alone=alone)
    assert set(dead.answers.values()) == {1}
    # One of eight is gone for half of the time, and the rows it had begin again.
    assert 1 < dead.seconds / whole.seconds < 1.15


@pytest.mark.slow
# With few rows each, the longest of a heavier tail would take longer than all the rest.
@pytest.mark.parametrize(
    ("replicas", "rows_each", "slots", "spread"), [(64, 400, 16, 1.0), (512, 40, 4, 0.5)]
)
def test_many_replicas(replicas, rows_each, slots, spread):
    shares = compare(replicas, rows_each=rows_each, slots=slots, spread=spread)
    print(f"{replicas} replicas: " + ", ".join(f"{p} {shares[p]:.1%}" for p in POLICIES))
    assert shares["balanced"] > max(shares["round_robin"], shares["static"])
    assert shares["balanced"] >= (0.95 if replicas == 64 else 0.85)
