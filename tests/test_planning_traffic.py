"""What a module moves, counted by hand: in small printed modules, and in one compiled for a TPU."""

import jax
import jax.numpy as jnp
import pytest
from tpu_topology import compile_on, topology_mesh

from lepton_jax.planning.module_text import VECTOR_MEMORY, Module
from lepton_jax.planning.topology import devices_of, split_name, topology_devices, torus_of
from lepton_jax.planning.traffic import traffic


def entry(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    main = f"ENTRY %main (a: f32[1]) -> f32[1] {{\n{body}\n}}\n"
    return f"HloModule m, is_scheduled=true\n\n{before}\n{main}"


A = "%a = f32[1000,8]{1,0:T(8,128)} parameter(0)"
FAST = "f32[1000,8]{1,0:T(8,128)S(1)}"
KB = 32_000  # bytes of f32[1000, 8]


def moved(*lines, before="", **options):
    found = traffic(entry(*lines, before=before), **options)
    return found.read, found.written


def test_vector_memory_costs_nothing_and_main_memory_its_size():
    assert moved(A, "%b = f32[1000,8]{1,0} negate(%a)") == (KB, KB)
    assert moved(A, f"%b = {FAST} negate(%a)") == (KB, 0)
    assert moved(f"%a = {FAST} parameter(0)", f"%b = {FAST} negate(%a)") == (0, 0)


def test_what_goes_through_vector_memory_is_asked_for_by_name():
    lines = (A, f"%b = {FAST} negate(%a)", "%c = f32[1000,8]{1,0} negate(%b)")
    assert moved(*lines) == (KB, KB)
    assert moved(*lines, space=VECTOR_MEMORY) == (KB, KB)
    assert moved(*lines[:2], space=VECTOR_MEMORY) == (0, KB)


def test_a_prefetch_is_read_once():
    start = f"%s = ({FAST}, f32[1000,8]{{1,0}}, u32[]{{:S(2)}}) copy-start(%a)"
    done = f"%d = {FAST} copy-done(%s)"
    assert moved(A, start, done, f"%b = {FAST} negate(%d)") == (KB, 0)


def test_a_slice_is_read_at_its_own_size():
    part = "f32[10,8]{1,0:T(8,128)S(1)}"
    start = f"%s = ((f32[1000,8]{{1,0}}), {part}, s32[]{{:S(2)}}) slice-start(%a), slice={{[0:10]}}"
    assert moved(A, start, f"%d = {part} slice-done(%s)") == (320, 0)
    assert moved(A, f"%b = {part} slice(%a), slice={{[0:10], [0:8]}}") == (320, 0)


GATHER = """
%rows (p0: f32[1000,8], p1: s32[4]) -> f32[4,8] {
  %p0 = f32[1000,8]{1,0} parameter(0)
  %flat = f32[8000]{0} bitcast(%p0)
  %p1 = s32[4]{0} parameter(1)
  ROOT %g = f32[4,8]{1,0} gather(%flat, %p1), offset_dims={1}
}
"""
NESTED = """
%relaid (q: f32[1000,8]) -> f32[1000,8] {
  %q = f32[1000,8]{1,0} parameter(0)
  ROOT %c = f32[1000,8]{1,0} copy(%q)
}

%part (p0: f32[1000,8], p1: s32[]) -> f32[2,8] {
  %p0 = f32[1000,8]{1,0} parameter(0)
  %f = f32[1000,8]{1,0} fusion(%p0), kind=kLoop, calls=%relaid
  %p1 = s32[]{:S(6)} parameter(1)
  ROOT %s = f32[2,8]{1,0:T(8,128)S(1)} dynamic-slice(%f, %p1, %p1)
}
"""
UPDATE = """
%put (p0: f32[1000,8], p1: f32[2,8], p2: s32[2]) -> f32[1000,8] {
  %p0 = f32[1000,8]{1,0} parameter(0)
  %p1 = f32[2,8]{1,0} parameter(1)
  %p2 = s32[2]{0} parameter(2)
  ROOT %s = f32[1000,8]{1,0} scatter(%p0, %p2, %p1), to_apply=%add
}
"""


def test_a_fused_gather_reads_rows_and_a_fused_scatter_writes_them():
    ids = "%i = s32[4]{0} parameter(1)"
    call = "%b = f32[4,8]{1,0} fusion(%a, %i), kind=kCustom, calls=%rows"
    assert moved(A, ids, call, before=GATHER) == (4 * 8 * 4 + 4 * 4, 4 * 8 * 4)
    rest = ("%u = f32[2,8]{1,0} parameter(1)", "%i = s32[2]{0} parameter(2)")
    call = "%b = f32[1000,8]{1,0} fusion(%a, %u, %i), kind=kCustom, calls=%put"
    assert moved(A, *rest, call, before=UPDATE) == (64 + 8, 64)


def test_a_slice_of_a_fused_copy_reads_a_slice_and_a_copy_all():
    index = "%i = s32[]{:S(6)} parameter(1)"
    part = "%b = f32[2,8]{1,0:T(8,128)S(1)} fusion(%a, %i), kind=kLoop, calls=%part"
    assert moved(A, index, part, before=NESTED) == (64, 0)
    whole = f"%b = {FAST} fusion(%a), kind=kLoop, calls=%relaid"
    assert moved(A, whole, before=NESTED) == (KB, 0)


LOOP = """
%body (t: (s32[], f32[1000,8])) -> (s32[], f32[1000,8]) {
  %t = (s32[]{:T(128)}, f32[1000,8]{1,0}) parameter(0)
  %x = f32[1000,8]{1,0} get-tuple-element(%t), index=1
  %y = f32[1000,8]{1,0} negate(%x)
  ROOT %r = (s32[]{:T(128)}, f32[1000,8]{1,0}) tuple(%t, %y)
}

%below (t: (s32[], f32[1000,8])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[1000,8]{1,0}) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%t), index=0
  %n = s32[]{:S(6)} constant(5)
  ROOT %c = pred[]{:S(6)} compare(%i, %n), direction=LT
}

%whenever (t: (s32[], f32[1000,8])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[1000,8]{1,0}) parameter(0)
  ROOT %c = pred[]{:S(6)} custom-call(%t), custom_call_target="AssumeGatherIndicesInBound"
}
"""


@pytest.mark.parametrize(
    ("condition", "attributes", "times"),
    [
        ("whenever", "", 8),
        ("below", "", 5),
        ("whenever", ', backend_config={"known_trip_count":{"n":"3"}}', 3),
    ],
)
def test_loops_count_as_often_as_they_run(condition, attributes, times):
    call = f"%w = (s32[], f32[1000,8]) while(%z), condition=%{condition}, body=%body{attributes}"
    z = "%z = (s32[], f32[1000,8]{1,0}) tuple(%a, %a)"
    assert moved(A, z, call, before=LOOP, steps=8) == (times * KB, times * KB)


def test_what_a_kernel_sees_in_part_is_left_to_the_caller():
    call = '%k = f32[4,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"'
    assert moved(A, call) == (KB, 128)
    assert moved(A, call, partly={KB: 0}) == (0, 128)
    assert moved(A, call, partly={KB: 320.0}) == (320, 128)
    free = f'%k = {FAST} custom-call(%a), custom_call_target="ConcatBitcast"'
    assert moved(A, free) == (0, 0)


def test_collectives_are_counted_with_their_bytes():
    reduce = f"%s = {FAST} all-reduce-start(%a), replica_groups={{{{0,1}}}}, to_apply=%add"
    found = traffic(entry(A, reduce, f"%d = {FAST} all-reduce-done(%s)"))
    assert dict(found.collectives) == {"all-reduce": 1}
    assert found.collective_bytes["all-reduce"] == KB


ELSEWHERE = """
%summed (p: f32[1000,8]) -> f32[1000,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  ROOT %r = f32[1000,8]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}, execution_thread="sparsecore"
"""


@pytest.mark.parametrize("call", ["custom-call-start", "call-start"])
def test_what_another_core_does_is_counted_once(call):
    flag = "((f32[1000,8]{1,0}), f32[1000,8]{1,0}, u32[]{:S(8)})"
    begin = f"%s = {flag} {call}(%a), called_computations={{%summed}}"
    done = f"%d = f32[1000,8]{{1,0}} {call.removesuffix('-start')}-done(%s)"
    found = traffic(entry(A, begin, done, before=ELSEWHERE))
    assert (found.read, found.written, found.collectives["all-reduce"]) == (KB, KB, 1)


def test_a_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY: its format has changed"):
        Module("HloModule m\n")


@pytest.mark.parametrize("chip", ["v5e:1x1", "v6e:1x1", "v5p:1x1x1", "tpu7x:1x1x1"])
def test_a_compiled_product_reads_its_weights_once(chip):
    def product(x, table, ids):
        rows = jnp.einsum("MI,OI->MO", x, table, preferred_element_type=jnp.float32)
        return rows, table[ids]

    out, inputs = 131072, 1024
    found = traffic(
        compile_on(
            topology_mesh(chip),
            product,
            jax.ShapeDtypeStruct((8, inputs), jnp.bfloat16),
            jax.ShapeDtypeStruct((out, inputs), jnp.bfloat16),
            jax.ShapeDtypeStruct((8,), jnp.int32),
        ).as_text()
    )
    weights, results = 2 * out * inputs, 4 * 8 * out
    assert weights <= found.read < 1.01 * weights + results
    assert found.written < 1.1 * results


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:1x1", "no such chip; want one of v4, v5e"),
        ("v6e:3x5", "v6e comes in slices of 1x1, 2x2, 2x4"),
        ("v5p", r"v5p comes in slices of .*2x2x1"),
        ("v5e:0x1", "v5e comes in slices"),  # libtpu itself would crash
    ],
)
def test_a_slice_that_does_not_exist_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(name)


def test_a_missing_libtpu_is_named_with_its_installation(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the TPU compiler.*pip install libtpu"):
        topology_devices("v6e:1x1")


def test_devices_of_a_slice_are_those_that_its_machines_show():
    seen = {"v4:1x1x1": 1, "v4:2x2x1": 4, "v5e:2x4": 8, "v5p:2x2x1": 4, "tpu7x:1x1x1": 2}
    assert {name: len(topology_devices(name)) for name in seen} == seen
    assert {name: devices_of(*split_name(name)) for name in seen} == seen


@pytest.mark.parametrize(
    ("name", "shards"),
    [
        ("v5e:2x4", 2),
        ("v5e:2x4", 8),
        ("v6e:4x4", 4),
        ("v6e:4x4", 16),
        ("v4:2x2x2", 4),
        ("v5p:2x2x4", 16),
        ("tpu7x:2x2x1", 2),
        ("tpu7x:2x2x1", 8),
    ],
)
def test_devices_that_share_a_model_lie_as_the_compiler_has_them(name, shards):
    kind, _ = split_name(name)
    places = [device.coords for device in topology_devices(name)[:shards]]
    lengths = [1 + max(axis) - min(axis) for axis in zip(*places, strict=True)]
    assert sorted(n for n, _ in torus_of(kind, shards).axes) == sorted(n for n in lengths if n > 1)
