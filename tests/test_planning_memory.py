"""Memory and time from shapes alone, against arithmetic by hand and the runner's own allocation."""

import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import pytest

from lepton_jax.compression.presets import compress_specs, preset_rules
from lepton_jax.config import EngineSection
from lepton_jax.engine.runner import Runner
from lepton_jax.kernels import attention_tpu, attention_xla
from lepton_jax.models.build import abstract_model
from lepton_jax.models.registry import config_from_hf
from lepton_jax.planning.chips import TPUS, Chip, chip_here
from lepton_jax.planning.memory import (
    cache_bytes,
    fits,
    full_sizes,
    largest_len,
    largest_rows,
    memory_of,
)
from lepton_jax.planning.roofline import all_reduce_seconds, decode_cost, prefill_cost
from lepton_jax.planning.served import Served
from lepton_jax.tensors import dots

# V, L, D, F, N, K, H = 64, 2, 16, 32, 4, 2, 4
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
EXPERTS = TINY | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
QKV, OUT, GATE_UP, DOWN = 2 * 4 * 4 * 16, 16 * 16, 2 * 32 * 16, 16 * 32
LAYER, TABLE, NORMS = QKV + OUT + GATE_UP + DOWN, 64 * 16, 5 * 16
SECTION = EngineSection(page_size=16, prefill_chunk=32, decode_block=4)
# One byte and one operation a second in bf16: seconds are counts.
CHIP = Chip("by hand", memory=1 << 20, bandwidth=1.0, float32=0.5, bf16=1e3, int8=1e6)


def served(preset="none", *, values=TINY, backend=attention_xla, shards=1, spread=1):
    model = abstract_model(config_from_hf(values), jnp.bfloat16, jnp.bfloat16)
    leaves = compress_specs(preset_rules(preset), model.specs)
    return Served(model, leaves, backend, jnp.bfloat16, shards, spread)


def test_weights_by_hand():
    assert served().weight_bytes == 2 * (2 * LAYER + 2 * TABLE) + 4 * NORMS
    scales = 2 * (32 + 16 + 64 + 16) + 2 * 64  # outputs of each weight
    assert served("int8").weight_bytes == 2 * LAYER + 2 * TABLE + 4 * scales + 4 * NORMS


def test_a_shard_holds_its_part_of_weights_and_cache_and_all_norms():
    sizes = full_sizes(served(), SECTION, rows=3, max_len=40)
    whole, half = memory_of(served(), sizes), memory_of(served(shards=2), sizes)
    assert half.weights == (whole.weights - 4 * NORMS) // 2 + 4 * NORMS
    assert half.cache == whole.cache // 2


@pytest.mark.parametrize("backend", [attention_xla, attention_tpu])
def test_the_cache_is_what_the_runner_allocates(backend):
    plan = served(backend=backend)
    sizes = full_sizes(plan, SECTION, rows=3, max_len=40)
    assert sizes.num_pages == 1 + 3 * (3 + 1)
    runner = Runner(
        plan.model,
        tuple(spec.abstract() for spec in plan.leaves.values()),
        sizes=sizes,
        backend=backend,
        kv_dtype=plan.kv_dtype,
        eos_ids=(),
    )
    assert cache_bytes(plan, sizes) == runner.kv_bytes


def test_the_largest_rows_and_length_fit_and_one_more_does_not():
    plan, budget = served(), 200_000
    rows = largest_rows(plan, SECTION, max_len=40, budget=budget)
    assert fits(plan, full_sizes(plan, SECTION, rows=rows, max_len=40), budget=budget)
    assert not fits(plan, full_sizes(plan, SECTION, rows=rows + 1, max_len=40), budget=budget)
    length = largest_len(plan, SECTION, rows=rows, budget=budget)
    assert length + 16 >= 40 and length % 16 == 0
    assert not fits(plan, full_sizes(plan, SECTION, rows=rows, max_len=length + 16), budget=budget)
    assert largest_rows(plan, SECTION, max_len=40, budget=plan.weight_bytes) == 0


def test_no_context_is_longer_than_the_model():
    assert largest_len(served(), SECTION, rows=1, budget=1 << 40) == 256


def test_a_decode_step_by_hand():
    cost = decode_cost(served(), CHIP, rows=3, context=10)
    token = 2 * 2 * 4 * 2  # k and v of 2 heads of 4, bf16
    read = 2 * (2 * LAYER + TABLE + 3 * 16) + 4 * NORMS  # of the embedding three rows
    assert (cost.weight_bytes, cost.cache_bytes) == (read, 2 * 3 * 10 * token)
    attention = 2 * 3 * 10 * (4 * 4 * 4)  # q.k and p.v, two operations each
    assert cost.flops == 2 * 3 * (2 * LAYER + TABLE) + attention
    assert (cost.weights, cost.cache, cost.bound) == (read, cost.cache_bytes, "weights")
    assert cost.seconds == pytest.approx(cost.weights + cost.cache)


def test_windows_bound_what_a_step_sees():
    windowed = TINY | {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 4,
    }
    near = decode_cost(served(values=windowed), CHIP, rows=1, context=10)
    assert near.cache_bytes == decode_cost(served(), CHIP, rows=1, context=4).cache_bytes
    # Of 10 tokens each sees itself and at most three before: 1 + 2 + 3 + 7 x 4.
    matrices = prefill_cost(served(), CHIP, tokens=10).flops - 2 * 55 * 64
    assert prefill_cost(served(values=windowed), CHIP, tokens=10).flops == matrices + 2 * 34 * 64


def test_tokens_visit_some_experts_and_few_tokens_read_few():
    one = decode_cost(served(values=EXPERTS), CHIP, rows=1, context=0)
    many = decode_cost(served(values=EXPERTS), CHIP, rows=1000, context=0)
    experts = 2 * 8 * (GATE_UP + DOWN) * 2  # bytes of two layers
    others = 2 * (2 * (QKV + OUT + 8 * 16) + TABLE) + 4 * NORMS
    assert one.weight_bytes == others + 2 * 16 + experts // 4
    assert many.weight_bytes == others + 2 * TABLE + experts
    assert one.flops == 2 * (2 * (QKV + OUT + 8 * 16 + 2 * (GATE_UP + DOWN)) + TABLE)


def test_spread_experts_take_as_long_as_the_device_with_the_most_to_do():
    linked = dataclasses.replace(CHIP, link=4.0, hop=1.0)
    cut, spread = (served(values=EXPERTS, shards=4, spread=n) for n in (1, 4))
    assert cut.weight_bytes == spread.weight_bytes
    few, same = (decode_cost(plan, linked, rows=1, context=0) for plan in (cut, spread))
    experts = 2 * 8 * (GATE_UP + DOWN) * 2 // 4  # bytes of two layers on a device
    # It has two of the experts; each is visited with a chance of 1/4.
    most = 0.5 + math.sqrt(2 * math.log(4) * 0.5 * 0.75)
    assert same.weight_bytes - few.weight_bytes == pytest.approx(
        experts * (most / 2 - 1 / 4), abs=4
    )
    many, all_read = (decode_cost(plan, linked, rows=1000, context=0) for plan in (cut, spread))
    assert many.weight_bytes == all_read.weight_bytes
    visits = 2000 * (1 / 4) + math.sqrt(2 * math.log(4) * 2000 * (1 / 4) * (3 / 4))
    more = 2 * 2 * (GATE_UP + DOWN) * (visits - 500)
    assert all_read.flops - many.flops == pytest.approx(more, abs=4)


def test_int8_activations_take_the_int8_peak():
    fast = dataclasses.replace(CHIP, bandwidth=1e12)
    w8a8, int8 = (decode_cost(served(p), fast, rows=8, context=0) for p in ("w8a8", "int8"))
    assert int8.compute == pytest.approx(2 * 8 * (2 * LAYER + TABLE) / 1e3)
    tolerant = 2 * 8 * 2 * (OUT + GATE_UP)
    assert int8.compute - w8a8.compute == pytest.approx(tolerant / 1e3 - tolerant / 1e6)


@pytest.mark.parametrize(("rows", "vnni", "rate"), [(63, 0, 5e5), (64, 0, 1e4), (64, 1, 5e5)])
def test_a_cpu_takes_int8_weights_as_its_products_do(rows, vnni, rate, monkeypatch):
    monkeypatch.setattr(dots, "multiplies_int8", lambda: bool(vnni))
    cpu = dataclasses.replace(CHIP, bandwidth=1e12, float32=1e4, platform="cpu")
    cost = decode_cost(served("int8"), cpu, rows=rows, context=0)
    assert cost.compute == pytest.approx(2 * rows * (2 * LAYER + TABLE) / rate)


def test_collectives_take_their_share_and_need_links():
    with pytest.raises(ValueError, match=r"by hand: its interconnect.*mesh\.model=1"):
        decode_cost(served(shards=2), CHIP, rows=3, context=10)
    linked = dataclasses.replace(CHIP, link=4.0, hop=1.0)
    assert all_reduce_seconds(linked, 80, shards=4) == 2 * 3 * (80 / 4 / 4 + 1)
    cost = decode_cost(served(shards=2), linked, rows=3, context=10)
    assert cost.reduced_bytes == 5 * 3 * 16 * 2  # two a layer and the embedding's, in bf16
    assert cost.interconnect == pytest.approx(5 * all_reduce_seconds(linked, 96, shards=2))


@pytest.mark.parametrize(
    ("kind", "shards", "links", "hops"),
    [
        ("v5e", 2, 1, 1),
        ("v5e", 4, 2, 2),  # 2x2
        ("v5e", 8, 2, 4),  # 2x4: a corner has two links, and the opposite one is 1 + 3 hops away
        ("v6e", 64, 2, 14),  # 8x8
        ("v6e", 128, 3, 15),  # 8x16: the longer axis is a ring, halfway around is 8
        ("v6e", 256, 4, 16),
        ("v4", 8, 3, 3),  # 2x2x2
        ("v5p", 16, 3, 5),  # 2x2x4
        ("v5p", 64, 6, 6),  # 4x4x4: rings
    ],
)
def test_an_all_reduce_goes_along_the_axes_of_a_slice(kind, shards, links, hops):
    of_all = {"v5e": 4, "v6e": 4}.get(kind, 6)
    chip = dataclasses.replace(TPUS[kind], link=of_all * 8.0, hop=1.0)
    moved = 2 * (shards - 1) / shards * 1024 / (8 * links)
    assert all_reduce_seconds(chip, 1024, shards=shards) == pytest.approx(moved + 2 * hops)


def test_the_two_devices_of_a_chip_reduce_before_their_chips_do():
    chip = dataclasses.replace(TPUS["tpu7x"], link=48.0, hop=1.0)  # of each: half of its chip's
    pair = 2 * (1024 / 2 / 48 + 1)
    assert all_reduce_seconds(chip, 1024, shards=2) == pytest.approx(pair)
    square = 2 * 3 / 4 * 512 / (48 * 2 / 6) + 2 * 2
    assert all_reduce_seconds(chip, 1024, shards=8) == pytest.approx(pair + square)


@pytest.mark.parametrize(
    ("platform", "kind", "link"),
    [
        ("tpu", "TPU v5 lite", TPUS["v5e"].link),
        ("tpu", "TPU v4", TPUS["v4"].link),
        ("gpu", "NVIDIA H200", 450e9),
    ],
)
def test_the_links_of_the_device_at_hand_are_known(platform, kind, link, monkeypatch):
    here = types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [here])
    assert chip_here().link == link
    known = {"TPU v5 lite": TPUS["v5e"], "TPU v4": TPUS["v4"]}  # plans of a slice are the same
    assert chip_here() == known.get(kind, chip_here())
    assert decode_cost(served(shards=2), chip_here(), rows=3, context=10).interconnect > 0
