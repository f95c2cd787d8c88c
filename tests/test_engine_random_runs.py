"""The scheduler under random requests, ends, aborts, knobs and too few pages.

Every request must end once with the tokens that it gets alone; pages must be conserved; no page
that a row may write is another's; the oldest request must never wait long.
"""

import math
from collections import Counter

import pytest
from fake_device import FakeEngine, expected_tokens, request
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_jax.engine.knobs import Knobs

SHARED = [1, 2, 3, 1, 2, 3, 1, 2, 3]
NEW_REQUESTS = st.lists(
    st.fixed_dictionaries(
        dict(
            prompt=st.builds(
                lambda shared, own: SHARED[:shared] + own,
                st.sampled_from([0, 3, 8, 9]),
                st.lists(st.integers(1, 3), max_size=6),
            ),
            max_tokens=st.sampled_from([1, 2, 6, 12, 24]),
            vocab=st.sampled_from([4, 30, 1000]),  # of which one token ends the text
            presence_penalty=st.sampled_from([0.0, 0.0, 0.0, 0.5]),
        )
    ),
    min_size=1,
    max_size=5,
)


class Runs(RuleBasedStateMachine):
    @initialize(
        rows=st.integers(1, 5),
        page_size=st.integers(1, 4),
        spare_pages=st.integers(0, 8),
        tiles=st.integers(1, 4),
        q_tile=st.integers(1, 4),
        decode_block=st.integers(1, 5),
        max_len=st.integers(10, 24),
        prefix_cache=st.sampled_from([True, True, True, False]),
        draft=st.sampled_from([0, 0, 1, 4]),
        banks=st.sampled_from([1, 1, 2, 3]),
    )
    def start(self, spare_pages, tiles, **sizes):
        sizes["num_pages"] = (
            math.ceil(0.8 * sizes["max_len"] / sizes["page_size"]) + 1 + spare_pages
        )
        chunk = tiles * sizes["q_tile"]
        self.most = Knobs(sizes["decode_block"], chunk, sizes["rows"], sizes["draft"])
        self.engine = FakeEngine(prefill_chunk=self.most.prefill_chunk, **sizes)
        self.requests, self.expected, self.aborted, self.idle = {}, {}, set(), Counter()
        self.patience = 3 + sizes["rows"] * math.ceil(sizes["max_len"] / sizes["q_tile"])

    @rule(news=NEW_REQUESTS)
    def add(self, news):
        e, pool = self.engine, self.engine.scheduler._pools[0]
        for new in news:
            r = request(f"r{len(self.requests)}", **new)
            count = len(r.prompt_ids)
            total = count + min(r.params.max_tokens, e.max_len - count) - 1
            fits = pool.pages_for(total) <= pool.num_pages - 1
            if 0 < count < e.max_len and fits:
                e.add(r)
                self.requests[r.id] = r
                self.expected[r.id] = expected_tokens(r, e.max_len)
            else:
                with pytest.raises(ValueError, match=r"want at least one|leaves room|num_pages"):
                    e.add(r)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(sorted(self.requests)))
        if name not in self.engine.reasons:
            self.aborted.add(name)
        self.engine.scheduler.abort(name)
        self.idle.clear()

    @rule(data=st.data())
    def turn_knobs(self, data):
        m = self.most
        chunk = data.draw(st.integers(1, m.prefill_chunk // self.engine.tile)) * self.engine.tile
        block, live = (data.draw(st.integers(1, n)) for n in (m.decode_block, m.live_rows))
        self.engine.scheduler.knobs = Knobs(
            block,
            chunk,
            live,
            draft=data.draw(st.integers(0, m.draft)),
            admit_together=data.draw(st.integers(1, m.live_rows)),
            reserve_pages=data.draw(st.integers(0, 2)),
            beat_cost=data.draw(st.sampled_from([0.0, 1.0, 9.0])),
            longest_first=data.draw(st.booleans()),
            prefill_beats=data.draw(st.sampled_from([0, 1, 2, 64])),
        )
        self.idle.clear()  # how long a row may wait depends on the knobs

    @rule(beats=st.integers(1, 4))
    def run_on(self, beats):
        for _ in range(beats):
            self.beat()

    def beat(self):
        """A beat; the oldest request that isn't planned to its end must come to its turn soon."""
        e = self.engine
        left = [r for r in e.scheduler._rows.values() if not 0 < r.limit <= r.least]
        plan = e.beat()
        for row in left[:1]:
            lines = [*plan.chunks, *plan.rows] if plan else []
            self.idle[row] = 0 if row in [line.row for line in lines] else self.idle[row] + 1
            passing = len(self.requests) if e.scheduler.knobs.longest_first else 1
            assert self.idle[row] <= self.patience * passing, f"{row.request.id} starves"

    @invariant()
    def pages_and_slots_are_conserved(self):
        if not hasattr(self, "engine"):
            return
        s = self.engine.scheduler
        for bank, pool in enumerate(s._pools):
            running = [row for row in s._running if row.bank == bank]
            counts = Counter(page for row in running for page in row.pages)
            assert sorted([*pool._free, *pool._cached, *counts]) == list(range(1, pool.num_pages))
            assert all(pool.references(page) == count for page, count in counts.items())
            for row in running:
                computed = row.computed - (row.bound - row.least)
                writable = row.pages[computed // pool.page_size :]
                assert all(counts[page] == 1 and page not in pool._key_of for page in writable)
        assert sorted([*s._slots, *(row.slot for row in s._running)]) == list(
            range(self.most.live_rows)
        )

    @invariant()
    def outputs_are_a_beginning_of_the_expected(self):
        for name, (tokens, _) in getattr(self, "expected", {}).items():
            got = self.engine.outputs[name]
            assert got == tokens[: len(got)]

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        e = self.engine
        for _ in range(20 + len(self.requests) * self.patience * 40):
            if e.has_work:
                self.beat()
        assert not e.has_work
        for name, expected in self.expected.items():
            if name not in self.aborted:
                assert (e.outputs[name], e.reasons[name]) == expected
        assert not self.aborted & set(e.reasons)
        assert e.scheduler.load.free_pages == e.scheduler.load.pages
        generated = sum(len(tokens) for tokens in e.outputs.values())
        assert e.scheduler.counters.generated_tokens == generated


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
