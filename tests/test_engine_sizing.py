"""What an engine's cache gets, by hand: of a host's memory, of a device's, and of too little."""

import logging
import types

import jax.numpy as jnp
import pytest
from engine_reference import tiny

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine import loop, sizing
from lepton_jax.engine.sizing import cache_budget, plan_sizes
from lepton_jax.kernels import attention_xla
from lepton_jax.kernels.attention import Blocked

GIB = 2**30
MODEL, LEAVES = tiny("llama", layers=1)
HEADS, WIDTH = MODEL.config.num_kv_heads, MODEL.config.head_dim
PAGE = 2 * HEADS * 16 * WIDTH * 4  # bytes: keys and values of 16 tokens in float32
SECTION = EngineSection(rows=4, page_size=16, max_len=64)


def plan(budget, totals=(), section=SECTION):
    """Pages, with so many pages' bytes of budget."""
    sizes = plan_sizes(
        section,
        MODEL,
        backend=attention_xla,
        kv_dtype=jnp.float32,
        totals=totals,
        budget=[PAGE * pages for pages in budget],
    )
    return sizes.num_pages


def test_a_host_gives_the_cache_a_quarter_of_its_memory(monkeypatch):
    memory = types.SimpleNamespace(total=64 * GIB, available=0)
    monkeypatch.setattr(sizing.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(sizing.jax, "local_device_count", lambda platform: 2)
    host = types.SimpleNamespace(platform="cpu", memory_stats=lambda: None)
    assert cache_budget(host, 10 * GIB) == (8 * GIB, GIB)
    assert cache_budget(host, 26 * GIB) == (int(0.9 * 64 * GIB) // 2 - 26 * GIB, GIB)
    assert cache_budget(host, 30 * GIB) == (GIB, GIB)
    stats = {"bytes_limit": 100 * GIB, "bytes_in_use": 30 * GIB}
    device = types.SimpleNamespace(platform="gpu", memory_stats=lambda: stats)
    assert cache_budget(device, 10 * GIB) == (60 * GIB, 60 * GIB)


def test_pages_are_what_the_requests_fill():
    assert plan((100, 3), [40, 20, 20, 10, 64]) == 1 + 4 + (4 + 3 + 2 + 2)
    assert plan((100, 3), [2**30]) == 1 + 4 + 4  # longer than any row gets
    assert plan((9, 3), [40, 20, 20, 10, 64]) == 9


def test_without_a_workload_one_row_fits_and_memory_stays_free():
    assert plan((100, 12)) == 12
    assert plan((100, 3)) == 5  # the null page, and one row of 64 tokens
    assert plan((100, 90)) == 1 + 4 + 4 * 4


def test_a_cache_of_fewer_rows_than_wanted_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        plan((100, 3), [64] * 9)
        plan((6, 6))
        plan((12, 3), [64, 64])  # the other two rows' spare pages are missed by nobody
        assert not caplog.records
        plan((12, 3), [64] * 9)
    assert "12 pages, holds about 2 of engine.rows=4" in caplog.text
    assert "engine.num_pages=21" in caplog.text


def test_too_little_memory_for_one_request_is_an_error_that_num_pages_overrules(monkeypatch):
    monkeypatch.setattr(loop, "cache_budget", lambda device, weights: (4 * PAGE, 4 * PAGE))
    params = SamplingParams(max_tokens=30)
    for options in ({}, {"workload": [(50, params)]}):
        with pytest.raises(ValueError, match=r"max_len=64 tokens needs .*engine\.num_pages=5"):
            loop.Engine(MODEL, LEAVES, section=SECTION, **options)
    free = EngineSection(rows=4, page_size=16)
    assert loop.Engine(MODEL, LEAVES, section=free, workload=[(10, params)]).max_len == 40
    given = EngineSection(rows=4, page_size=16, max_len=64, num_pages=5)
    assert loop.Engine(MODEL, LEAVES, section=given).limits.num_pages == 5


def test_an_engine_attends_in_the_blocks_that_were_asked_for():
    def backend(block):
        section = EngineSection(rows=4, page_size=16, max_len=64, attention_block=block)
        return loop.Engine(MODEL, LEAVES, section=section).runner.backend

    assert backend(0) is attention_xla
    assert backend(48) == Blocked(attention_xla, 48)
