"""The page pool: by hand, and against a model of what is free, cached and referenced."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lepton_jax.engine.pages import PagePool


def fill(pool: PagePool, tokens: list[int]) -> list[int]:
    """Pages that hold these tokens, registered as a row would."""
    keys = pool.keys(tokens)
    pages = pool.allocate(pool.pages_for(len(tokens)))
    for page, key in zip(pages, keys, strict=False):
        pool.register(page, key)
    return pages


def test_the_null_page_is_never_given():
    pool = PagePool(4, 2)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    assert pool.allocate(1) is None


def test_allocation_of_too_many_changes_nothing():
    pool = PagePool(4, 2)
    assert pool.allocate(4) is None
    assert pool.available == 3


def test_pages_for_rounds_up():
    pool = PagePool(4, 4)
    assert [pool.pages_for(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_keys_are_of_full_pages_and_depend_on_all_tokens_before():
    pool = PagePool(4, 2)
    assert len(pool.keys([1, 2, 3, 4, 5])) == 2
    assert pool.keys([1, 2, 3, 4])[0] == pool.keys([1, 2, 9, 9])[0]
    assert pool.keys([1, 2, 3, 4])[1] != pool.keys([9, 9, 3, 4])[1]
    assert pool.keys([1, 2]) != pool.keys([2, 1])


def test_keys_go_on_from_known_ones():
    pool = PagePool(4, 2)
    known = pool.keys([1, 2])
    assert pool.keys([1, 2, 3, 4], known) == pool.keys([1, 2, 3, 4])


def test_match_gives_the_longest_known_beginning():
    pool = PagePool(8, 2)
    pages = fill(pool, [1, 2, 3, 4])
    assert pool.match(pool.keys([1, 2, 3, 4, 5, 6])) == pages
    assert pool.match(pool.keys([1, 2, 9, 9])) == pages[:1]
    assert pool.match(pool.keys([9, 9, 3, 4])) == []
    assert [pool.references(page) for page in pages] == [3, 2]


def test_unreferenced_registered_pages_stay_known():
    pool = PagePool(4, 2)
    pages = fill(pool, [1, 2, 3, 4])
    pool.release(pages)
    assert pool.available == 3
    assert pool.match(pool.keys([1, 2, 3, 4])) == pages
    assert pool.available == 1


def test_eviction_takes_the_least_recently_used_and_the_end_of_a_text_first():
    pool = PagePool(6, 1)
    first, second = fill(pool, [1, 2]), fill(pool, [8, 9])
    pool.release(first)
    pool.release(second)
    pool.release(pool.match(pool.keys([1, 2])))  # used again: now the second is the older one
    got = [pool.allocate(1)[0] for _ in range(5)]
    assert got[1:] == [second[1], second[0], first[1], first[0]]  # after the one free page
    assert pool.match(pool.keys([1, 2])) == []


def test_of_two_pages_with_one_content_the_first_is_shared():
    pool = PagePool(6, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    assert first != second
    assert pool.match(pool.keys([1, 2])) == first
    pool.release(second)
    assert pool.available == 4  # free at once: nothing is known about it


@pytest.mark.parametrize("page", [0, 1])
def test_release_of_what_was_not_given_raises(page):
    pool = PagePool(4, 2)
    with pytest.raises(ValueError, match=f"page {page} was released more often"):
        pool.release([page])
    assert pool.available == 3


def test_impossible_sizes_raise():
    with pytest.raises(ValueError, match="num_pages=1"):
        PagePool(1, 4)
    with pytest.raises(ValueError, match="page_size=0"):
        PagePool(4, 0)


class Pool(RuleBasedStateMachine):
    """Holders of pages come and go; a model remembers which tokens each page holds."""

    @initialize(pages=st.integers(2, 12), size=st.integers(1, 3))
    def start(self, pages, size):
        self.pool = PagePool(pages, size)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple] = {}  # of the pages: all tokens up to their end

    @rule(tokens=st.lists(st.integers(0, 1), max_size=12))
    def hold(self, tokens):
        """What admission does: match, allocate the rest or give up, register."""
        pool, size = self.pool, self.pool.page_size
        keys = pool.keys(tokens)
        shared = pool.match(keys)
        for number, page in enumerate(shared, 1):
            assert self.content[page] == tuple(tokens[: number * size])
        need, available = pool.pages_for(len(tokens)) - len(shared), pool.available
        fresh = pool.allocate(need)
        assert (fresh is None) == (need > available)
        if fresh is None:
            pool.release(shared)
            assert pool.available >= available
            return
        others = {page for pages in self.held for page in pages}
        assert not others & set(fresh) and not set(shared) & set(fresh)
        pages = shared + fresh
        for number, page in enumerate(pages, 1):
            self.content[page] = tuple(tokens[: number * size])
        for page, key in zip(pages, keys, strict=False):
            pool.register(page, key)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def let_go(self, data):
        index = data.draw(st.integers(0, len(self.held) - 1))
        self.pool.release(self.held.pop(index))

    @invariant()
    def every_page_is_in_one_state(self):
        if not hasattr(self, "pool"):
            return
        pool = self.pool
        counts = Counter(page for pages in self.held for page in pages)
        assert all(pool.references(page) == counts[page] for page in range(pool.num_pages))
        states = [*pool._free, *pool._cached, *counts]
        assert sorted(states) == list(range(1, pool.num_pages))
        assert pool.available == pool.num_pages - 1 - len(counts)
        assert {page: key for key, page in pool._page_of.items()} == pool._key_of
        assert set(pool._cached) <= set(pool._key_of)


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
