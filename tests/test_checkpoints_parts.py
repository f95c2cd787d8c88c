"""Each process reads what its devices have of a weight, each device its own of a saved one; what
they get is what the whole weight would have given them.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import checkpoint_makers as make
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from lepton_jax.checkpoints import orbax_arrays
from lepton_jax.checkpoints.combine import bytes_of, in_rows, read
from lepton_jax.checkpoints.load import load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.checkpoints.stream import match, open_foreign
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.models.build import abstract_model
from lepton_jax.sharding import Placement
from lepton_jax.sharding.partition import pieces_of
from lepton_jax.sharding.placement import grid_of
from lepton_jax.tensors import Cut, CutTwice, ParamSpec

ROOT = Path(__file__).parents[1]


def opened(kind, place):
    config, files = open_foreign(kind, place)
    model = abstract_model(config, jnp.float32, jnp.float32)
    return model, files, match(model, files, kind=kind)


def as_process(placement, local):
    """The placement as a process sees it that has some of the devices only."""
    placement.local = tuple(local)
    return placement


def assert_regions(model, files, mappings, placement):
    """Regions of all parameters are read right, and no other rows; which parameters have some."""
    files.bytes_read = 0
    for path, spec in model.specs.items():
        region = placement.region(spec)
        mapping = mappings[path]
        if region is None or not in_rows(files, mapping, spec):
            continue
        before = files.bytes_read
        found = read(model.config, files, mapping=mapping, spec=spec, region=region)
        taken = files.bytes_read - before
        whole = read(model.config, files, mapping=mapping, spec=spec)
        np.testing.assert_array_equal(found, whole[region.slices], err_msg=path)
        assert found.dtype == whole.dtype and found.shape == region.shape
        assert taken == bytes_of(files, mapping, spec, region)
        rows = region.shape[:-1] != spec.shape[:-1]
        assert (taken < bytes_of(files, mapping, spec, None)) == rows  # of columns all are read
        yield path


@pytest.mark.parametrize("case", tiny_models.CASES)
@pytest.mark.parametrize(("devices", "local"), [(2, [1]), (4, [0, 1]), (8, [4, 5, 6, 7])])
def test_every_family_reads_the_rows_and_columns_that_its_devices_have(
    tmp_path, case, devices, local
):
    weights = tiny_models.FOLDER / tiny_models.CASES[case]["weights"]
    for file in (tiny_models.FOLDER / case / "config.json", weights / "model.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model, files, mappings = opened("hf", tmp_path)
    experts = model.config.num_experts
    grid = grid_of(jax.devices()[:devices], 2 if experts and experts % 2 == 0 else 1)
    placement = as_process(Placement(grid, model.heads), local)
    seen = set(assert_regions(model, files, mappings, placement))
    assert {"embed", "layers.0.experts_down" if experts else "layers.0.down"} <= seen
    # Where there are fewer kv heads than devices, each of the two processes may have all of them.
    assert "layers.0.qkv" in seen or model.config.num_kv_heads < devices


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_gguf_reads_the_rows_that_a_part_lies_in(tmp_path, kind):
    model, files, mappings = opened("gguf", make.gguf_file(tmp_path / "m.gguf", kind))
    for local in ([0], [1], [2, 3]):
        placement = as_process(Placement(jax.devices()[:4], model.heads), local)
        seen = set(assert_regions(model, files, mappings, placement))
        assert "layers.0.gate_up" in seen


@given(data=st.data())
def test_any_rows_and_columns(data, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "any-rows"
    kind = data.draw(st.sampled_from(["F16", "Q8_0"]))
    folder.mkdir(exist_ok=True)
    path = folder / f"{kind}.gguf"
    if not path.exists():
        make.gguf_file(path, kind)
    _, files = open_foreign("gguf", path)
    name = data.draw(st.sampled_from([n for n in files.names if len(files.shape(n)) == 2]))
    rows, columns = (
        slice(*sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2), label=what)))
        for what, size in zip(("rows", "columns"), files.shape(name), strict=True)
    )
    found = files.read_rows(name, np.dtype(np.float32), rows=rows, columns=columns)
    whole = files.read(name, np.dtype(np.float32))
    np.testing.assert_array_equal(found, whole[rows, columns])


SPEC = ParamSpec((4, 24, 96), jnp.float32, ("experts", "expert_ffn", "embed"), inputs=1)
WEIGHT = np.random.default_rng(0).normal(size=SPEC.shape).astype(np.float32)
CUTS = {
    "outputs": Cut(1, 4, 6),
    "padded outputs": Cut(1, 4, 7),
    "copies": Cut(0, 8, 1, copies=2),
    "inputs": Cut(2, 4, 24),
    "groups of outputs": CutTwice(1, 4, 12, Cut(0, 2, 2)),
    "groups of inputs": CutTwice(2, 8, 24, Cut(0, 2, 2)),
}
SCHEMES = {
    "keep": Scheme("keep"),
    "int8": Scheme(),
    "w8a8": Scheme(activations="dynamic"),
    "int8 g48": Scheme(group=48),
    "int4 g24": Scheme("int4", group=24, asymmetric=True),
    "int4 mse": Scheme("int4", group=24, rounding="mse"),
    "float8": Scheme("float8"),
    "2:4": Scheme("int8", prune="magnitude", pattern="2:4", storage="sparse"),
}
WHOLE_ROWS = ("int8", "w8a8", "float8", "2:4")  # what needs all inputs of an output


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_region_is_compressed_as_it_is_in_the_whole(name, how):
    scheme, cut = SCHEMES[name], CUTS[how]
    compress = compressor([Rule("w", scheme)], {"w": SPEC})
    pieces = None
    for some in ((0, 1), (2, 3), (3,), (1, 0)):
        region = cut.among(some, SPEC.shape)
        divides = compress.divides("w", SPEC, region)
        if region.shape == SPEC.shape:
            assert divides == (name != "2:4")
        elif cut.dim == 2:
            grouped = {"int8 g48": 48, "int4 g24": 24, "int4 mse": 24, "keep": 1}.get(name, 96)
            assert divides == all(end % grouped == 0 for end in region.bounds[2])
        else:
            assert divides == (name != "2:4")
        if not divides:
            continue
        if pieces is None:
            whole = compress("w", SPEC, jnp.asarray(WEIGHT))
            pieces = pieces_of(whole, cut)
        part = compress("w", SPEC, jnp.asarray(WEIGHT[region.slices]))
        parts = pieces_of(part, region.cut)
        assert len(region.places) == len(some)
        for place, device in zip(region.places, some, strict=True):
            jax.tree.map(np.testing.assert_array_equal, parts[place], pieces[device])


def test_devices_with_nothing_but_padding_read_all():
    spec = ParamSpec((3, 8), jnp.float32, ("vocab", "embed"), inputs=1)
    placement = Placement(jax.devices()[:8])
    assert as_process(placement, [6, 7]).region(spec) is None
    assert as_process(placement, [2, 3]).region(spec).bounds == ((2, 3), (0, 8))
    assert as_process(placement, range(8)).region(spec) is None


@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("kind", ["none", "w8a8", "int4"])
def test_each_device_reads_its_own_piece_of_a_saved_model(tmp_path, monkeypatch, kind, devices):
    folder = make.hf_folder(tmp_path / "hf")  # 8 devices are four banks for its two kv heads
    int4 = [Rule(r"layers\..*", Scheme("int4", group=8))]  # groups that no cut goes through
    whole, rules = load(folder), {"none": [], "w8a8": preset_rules("w8a8"), "int4": int4}[kind]
    if rules:
        whole = load(folder, compress=compressor(rules, whole.model.specs))
    saved = save(tmp_path / "saved", whole)
    placement = Placement(jax.devices()[:devices], whole.model.heads)
    expected = placement.put_all(whole.model.specs, whole.leaves)
    first_read, real = [], orbax_arrays.Reader.read

    def watched(self, abstract, **options):
        tree = real(self, abstract, **options)
        first_read.extend(
            shard.data.nbytes
            for array in jax.tree.leaves(tree)
            for shard in array.addressable_shards
            if shard.device == jax.devices()[0]
        )
        return tree

    monkeypatch.setattr(orbax_arrays.Reader, "read", watched)
    found = load(saved, devices=jax.devices()[:devices])
    assert jax.tree.structure(found.leaves) == jax.tree.structure(expected)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.leaves, expected)), strict=True):
        assert ours.sharding == theirs.sharding and ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    own = sum(
        shard.data.nbytes
        for array in jax.tree.leaves(expected)
        for shard in array.addressable_shards
        if shard.device == jax.devices()[0]
    )
    assert sum(first_read) == own < whole.bytes


def test_what_cannot_be_read_in_pieces_is_cut_after_reading(tmp_path):
    folder = make.hf_folder(tmp_path / "hf")
    specs = load(folder).model.specs
    sparse = Scheme("int8", prune="magnitude", pattern="2:4", storage="sparse")
    rules = [Rule(r".*\.(down|out)", sparse), Rule("embed", Scheme("int4", group=16))]
    whole = load(folder, compress=compressor(rules, specs))
    saved = save(tmp_path / "saved", whole)
    found = load(saved, devices=jax.devices()[:2])
    expected = Placement(jax.devices()[:2], whole.model.heads).put_all(specs, whole.leaves)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.leaves, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


HOST = """
import sys
import jax
import numpy as np
import orbax.checkpoint
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.compression.presets import compressor, preset_rules

def characters_read():
    return int(open("/proc/self/io").read().split()[1])

index, address, folder, preset = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(address, 2, index)
rules = preset_rules(preset)
compress = compressor(rules, describe(folder).specs) if rules else None
before = characters_read()
found = load(folder, compress=compress, devices=jax.devices())
print("read", characters_read() - before)
parts = {}
for n, array in enumerate(jax.tree.leaves(found.leaves)):
    for device, shard in enumerate(array.addressable_shards):
        parts[f"{n}_{4 * index + device}"] = shard.data
np.savez(f"{folder}/{index}.npz", **parts)
"""


def start(index, address, *arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", HOST, str(index), address, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "saved", "share"),
    [("none", False, 0.61), ("int8", False, 0.61), ("none", True, 0.75)],
)
def test_two_hosts_read_their_shares(tmp_path, preset, saved, share):
    """Half of the bytes, but all of `out` and `down`, a sixth of them here, whose rows lie on both
    hosts; of saved ones half, and what lies in chunks of 1 MiB or shortly behind it.
    """
    with make.medium_sized() as config:
        folder = make.hf_folder(tmp_path / "hf", make.hf_arrays(), **config)
    rules = preset_rules(preset)
    compress = compressor(rules, load(folder).model.specs) if rules else None
    if saved:
        whole = load(folder, compress=compress)
        folder, preset, compress = save(tmp_path / "saved", whole), "none", None
    expected = load(folder, compress=compress, devices=jax.devices()[:8])
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    hosts = [start(index, address, folder, preset) for index in (0, 1)]
    said = [host.communicate(timeout=120)[0] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    found = [np.load(folder / f"{index}.npz") for index in (0, 1)]
    for n, array in enumerate(jax.tree.leaves(expected.leaves)):
        for device, shard in enumerate(array.addressable_shards):
            np.testing.assert_array_equal(found[device // 4][f"{n}_{device}"], shard.data)
    weights = folder / "leaves" if saved else folder / "model.safetensors"
    stored = sum(f.stat().st_size for f in [weights, *weights.rglob("*")] if f.is_file())
    for text in said:
        read_bytes = int(re.search(r"read (\d+)", text)[1])
        assert 0.5 * stored < read_bytes < share * stored, (read_bytes, stored)


def test_arrays_are_stored_in_chunks_that_parts_need_but_not_in_tiny_ones(tmp_path):
    """Orbax's chunks divide each dimension: 1,031, a prime, would become that many rows."""
    shapes = {"pieces": (8, 3, 64, 1024), "prime": (1031, 2048), "line": (2**21 + 7,)}
    tree = {name: jnp.ones(shape, jnp.int8) for name, shape in shapes.items()}
    orbax_arrays.write(tmp_path / "tree", tree)
    stored = {}
    for name, shape in shapes.items():
        store = {"driver": "ocdbt", "base": f"file://{tmp_path}/tree/", "path": f"{name}/"}
        spec = {"driver": "zarr", "kvstore": store}
        stored[name] = tensorstore.open(spec, open=True).result()
        assert stored[name].shape == shape
    chunks = {name: array.chunk_layout.read_chunk.shape for name, array in stored.items()}
    assert chunks == {"pieces": (1, 3, 64, 1024), "prime": (1031, 2048), "line": (2**21 + 7,)}
