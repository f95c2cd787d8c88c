"""Who gets which row: small cases by hand, and none lost and none twice whatever happens."""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lepton_jax.distributed.balancer import Balancer
from lepton_jax.distributed.ledger import Ledger


def balancer_of(replicas, rows, *, slots=2, **options):
    """A balancer with these replicas and rows {key: work, or (work, prefix)}."""
    balancer = Balancer(**options)
    for name in replicas:
        balancer.add_replica(name, slots=slots, now=0.0)
    for key, row in rows.items():
        work, prefix = row if isinstance(row, tuple) else (row, None)
        balancer.add(key, work, prefix=prefix)
    return balancer


def test_the_longest_goes_to_the_replica_that_is_free_first():
    rows = {"a": 10, "b": 40, "c": 30, "d": 20}
    balancer = balancer_of("xy", rows)
    # b to x (both empty), c to y, d to y (30 < 40), a to x (40 < 50)
    assert balancer.deal(0.0, ["x", "y"]) == {"x": ["b", "a"], "y": ["c", "d"]}
    assert balancer.owner("d") == "y"
    assert len(balancer) == 4


def test_a_replica_gets_its_slots_and_a_quarter_ahead_while_there_is_plenty():
    balancer = balancer_of("xy", {f"{n}": 10 for n in range(100)}, slots=8)
    dealt = balancer.deal(0.0, ["x"])
    assert dealt == {"x": [f"{n}" for n in range(10)]}  # equals in the order in which they came
    assert balancer.deal(0.0, ["x"]) == {"x": []}


def test_few_rows_are_split_by_the_measured_rates():
    balancer = balancer_of("xy", {"p": 30, "q": 30}, slots=1)
    balancer.deal(0.0, ["x", "y"])
    balancer.beat("x", {"p": 30}, now=1.0)
    balancer.beat("y", {"q": 25}, now=1.0)
    for key in "pq":
        balancer.drop(key)
    balancer.replicas["x"].slots = balancer.replicas["y"].slots = 8
    for n in range(11):
        balancer.add(f"{n}", 5.0)
    dealt = balancer.deal(1.0, ["x", "y"])
    assert (len(dealt["x"]), len(dealt["y"])) == (6, 5)  # 30 to 25 tokens a second


def test_a_slow_replica_gets_no_row_that_would_outlast_the_job():
    balancer = balancer_of("xy", {"p": 100, "q": 100}, slots=1)
    balancer.deal(0.0, ["x", "y"])
    balancer.beat("x", {"p": 100}, now=1.0)
    balancer.beat("y", {"q": 10}, now=1.0)
    balancer.drop("p")
    balancer.drop("q")
    for key, work in {"long": 500, "short": 10, "middle": 200}.items():
        balancer.add(key, work)
    # 710 tokens at 110 a second are 6.5 s; half of that is 32 tokens on y.
    assert balancer.deal(1.0, ["y"]) == {"y": ["short"]}
    assert balancer.deal(1.0, ["x"]) == {"x": ["long"]}


def test_rows_that_begin_alike_go_where_that_is_computed():
    rows = {f"{p}{n}": (10 + n, p) for n in range(4) for p in "ab"}
    balancer = balancer_of("xy", rows, slots=2)
    dealt = balancer.deal(0.0, ["x", "y"])
    groups = {name: {key[0] for key in keys} for name, keys in dealt.items()}
    assert sorted(map(sorted, groups.values())) == [["a"], ["b"]]
    while len(balancer):
        for name, keys in dealt.items():
            balancer.beat(name, dict.fromkeys(keys, 10.0), now=1.0)
            for key in keys:
                balancer.drop(key)
                assert key[0] in groups[name]
        dealt = balancer.deal(1.0, ["x", "y"])
        if all(not dealt[name] for name in dealt):
            break
    assert len(balancer) == 0


def test_others_help_where_the_home_of_a_beginning_is_too_far_behind():
    balancer = balancer_of("xy", {f"{n}": (10, "same") for n in range(40)}, slots=4)
    dealt = balancer.deal(0.0, ["x", "y"])
    assert len(dealt["x"]) == len(dealt["y"]) == 5


def test_the_rows_of_a_dead_replica_are_queued_again_and_none_is_lost():
    balancer = balancer_of("xy", {f"{n}": 10 for n in range(4)})
    dealt = balancer.deal(0.0, ["x", "y"])
    assert sorted(balancer.lose("x")) == sorted(dealt["x"])
    for key in dealt["y"]:
        assert balancer.drop(key) == "y"
    assert sorted(balancer.deal(1.0, ["y"])["y"]) == sorted(dealt["x"])


def test_a_stalled_replica_gets_nothing_and_idle_ones_take_its_rows():
    balancer = balancer_of("xy", {"a": 10, "b": 10}, slots=2, stall_after=5.0)
    assert balancer.deal(0.0, ["x", "y"]) == {"x": ["a"], "y": ["b"]}
    balancer.beat("x", {"a": 9}, now=1.0)
    balancer.beat("y", {"b": 10}, now=4.0)
    balancer.drop("b")
    assert balancer.recall(4.0) == []
    balancer.add("c", 10)
    assert balancer.deal(7.0, ["x"]) == {"x": []}
    assert balancer.deal(7.0, ["y"]) == {"y": ["c"]}
    assert balancer.recall(7.0) == [("a", "x")]
    assert balancer.deal(7.0, ["x", "y"]) == {"x": [], "y": ["a"]}


def test_the_first_token_may_take_longer():
    balancer = balancer_of("x", {"a": 10}, stall_after=5.0)
    balancer.deal(0.0, ["x"])
    assert [balancer.stalled("x", now) for now in (6.0, 20.0, 20.1)] == [False, False, True]


def test_a_row_goes_back_to_a_replica_where_nobody_else_can_take_it():
    balancer = balancer_of("xy", {"a": 10, "b": 10}, slots=1, stall_after=5.0)
    balancer.deal(0.0, ["x", "y"])
    balancer.beat("x", {"a": 1}, now=1.0)
    balancer.beat("y", {"b": 10}, now=1.0)
    balancer.drop("b")
    assert balancer.recall(7.0) == [("a", "x")]
    balancer.beat("x", {}, now=8.0)  # it was only slow
    assert balancer.deal(8.0, ["x"]) == {"x": ["a"]}


def test_at_the_end_rows_leave_a_replica_that_has_become_slow():
    balancer = balancer_of("xy", {f"{n}": 10 for n in range(8)}, slots=4)
    dealt = balancer.deal(0.0, ["x", "y"])
    balancer.beat("x", dict.fromkeys(dealt["x"], 10.0), now=1.0)
    for key in dealt["x"]:
        balancer.drop(key)
    balancer.beat("y", dict.fromkeys(dealt["y"], 0.5), now=1.0)
    assert sorted(balancer.recall(1.0)) == sorted((key, "y") for key in dealt["y"])
    assert sorted(balancer.deal(1.0, ["y", "x"])["x"]) == sorted(dealt["y"])


def test_names_and_keys_are_their_own():
    balancer = balancer_of("x", {"a": 1})
    with pytest.raises(ValueError, match="replica 'x' is already there"):
        balancer.add_replica("x", slots=1, now=0.0)
    with pytest.raises(ValueError, match="row 'a' is already there"):
        balancer.add("a", 1.0)
    balancer.deal(0.0, ["x"])
    with pytest.raises(ValueError, match="row 'a' is already there"):
        balancer.add("a", 1.0)


class Anything(RuleBasedStateMachine):
    """Rows come, replicas come, work, stall, die: each row is in one place, and ends once."""

    def __init__(self):
        super().__init__()
        self.balancer = Balancer(stall_after=20.0)
        self.held: dict[str, set[str]] = {}
        self.open: set[str] = set()
        self.now, self.count = 0.0, 0

    @rule(slots=st.integers(1, 5))
    def join(self, slots):
        self.count += 1
        self.balancer.add_replica(f"r{self.count}", slots=slots, now=self.now)
        self.held[f"r{self.count}"] = set()

    @rule(works=st.lists(st.integers(0, 100), max_size=9), prefix=st.sampled_from([None, 1, 2, 3]))
    def add(self, works, prefix):
        for work in works:
            self.count += 1
            self.balancer.add(f"{self.count}", work, prefix=prefix)
            self.open.add(f"{self.count}")

    @rule(seconds=st.floats(0, 30))
    def wait(self, seconds):
        self.now += seconds

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def deal(self, data):
        ready = data.draw(st.lists(st.sampled_from(sorted(self.held)), unique=True))
        for name, keys in self.balancer.deal(self.now, ready).items():
            for key in keys:
                assert key in self.open and not any(key in held for held in self.held.values())
                self.held[name].add(key)
        idle = not any(self.balancer.stalled(name, self.now) for name in self.held)
        if idle and len(ready) == len(self.held) and self.open:
            assert any(self.held.values()), "rows are queued and nobody works"

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(0, 50), ends=st.integers(0, 3))
    def work(self, data, count, ends):
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.balancer.beat(name, dict.fromkeys(sorted(self.held[name]), count), self.now)
        for key in sorted(self.held[name])[:ends]:
            assert self.balancer.drop(key) == name
            self.held[name].remove(key)
            self.open.remove(key)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data):
        key = data.draw(st.sampled_from(sorted(self.open)))
        name = self.balancer.drop(key)
        if name:
            self.held[name].remove(key)
        self.open.remove(key)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def die(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        assert set(self.balancer.lose(name)) == self.held.pop(name)

    @rule()
    def recall(self):
        for key, name in self.balancer.recall(self.now):
            self.held[name].remove(key)

    @invariant()
    def each_row_is_in_one_place(self):
        assert len(self.balancer) == len(self.open)
        for key in self.open:
            owner = self.balancer.owner(key)
            assert {n for n, held in self.held.items() if key in held} == ({owner} - {None})

    def teardown(self):
        """Whatever came before, fresh replicas end all rows."""
        for name in list(self.held):
            self.balancer.lose(name)
        self.balancer.add_replica("last", slots=3, now=self.now)
        for _ in range(len(self.open)):
            for key in self.balancer.deal(self.now, ["last"])["last"]:
                assert self.balancer.drop(key) == "last"
                self.open.remove(key)
        assert not self.open and not len(self.balancer)
        super().teardown()


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_accounts_by_hand():
    ledger = Ledger()
    for name in "xy":
        ledger.open(name, slots=2, now=0.0)
    ledger.beat("x", tokens=200, held=2, ended=1, now=10.0)  # full: 20 a second
    ledger.beat("x", tokens=50, held=1, ended=1, now=15.0)
    ledger.beat("y", tokens=100, held=2, ended=2, now=10.0)  # 10 a second
    ledger.beat("y", tokens=0, held=0, ended=0, now=20.0)
    report = ledger.report()
    assert [r["utilization"] for r in report["replicas"]] == [0.75, 0.5]
    assert [r["rows"] for r in report["replicas"]] == [2, 2]
    assert report["tail_idle"] == (5 + 10) / 40
    assert report["ideal_seconds"] == round(350 / 30, 3)  # all tokens at both rates
    assert report["of_ideal"] == round(350 / 30 / 20, 4)


def test_measured_is_never_better_than_the_best():
    ledger = Ledger()
    ledger.open("x", slots=2, now=0.0)
    ledger.beat("x", tokens=0, held=2, ended=0, now=8.0)  # compiling, with all slots taken
    ledger.beat("x", tokens=90, held=1, ended=2, now=10.0)
    assert ledger.report()["of_ideal"] == 1.0


def test_time_without_rows_is_no_time_of_a_rate():
    balancer = Balancer()
    balancer.add_replica("a", slots=1, now=0.0)
    balancer.beat("a", {}, 10.0)
    balancer.add("row", 20.0)
    assert balancer.deal(10.0, ["a"]) == {"a": ["row"]}
    balancer.beat("a", {"row": 20.0}, 20.0)
    assert balancer.replicas["a"].rate == 2.0
