"""GGUF: every block type against the `gguf` package, and that every damaged file is refused."""

import struct

import checkpoint_makers as make
import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.gguf_files import metadata_only, open_gguf
from lepton_jax.text.gguf_metadata import read_metadata

F32 = np.dtype(np.float32)
FLOATS = {"F32", "F16", "BF16"}


def decodable() -> list[str]:
    """Names of the types that the installed gguf package decodes."""
    names = []
    for kind, (_, block_bytes) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return names


def raw_gguf(path, tensors: dict, **metadata):
    """A GGUF of raw tensors: name to (kind, bytes as uint8 `[rows, row_bytes]`)."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    for name, (kind, raw) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", decodable())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random bytes hold infinite scales
def test_every_block_type(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = 3 if block_size > 1 else 96
    # 40 rows of several blocks, more than one slab in two of the tensors
    rows = 40 if block_size > 1 else 4
    raw = np.random.default_rng(0).integers(0, 256, (rows, blocks * block_bytes), np.uint8)
    long = np.tile(raw, (3000 * 32 // (rows * blocks * block_size) + 40, 1))
    path = raw_gguf(tmp_path / "x.gguf", {"a": (kind, raw), "b": (kind, long), "c": (kind, raw)})
    _, files = open_gguf(path)
    for tensor, data in (("a", raw), ("b", long), ("c", raw)):
        expected = gguf.dequantize(data, kind)
        found = files.read(tensor, F32)
        assert found.shape == files.shape(tensor) == expected.shape
        np.testing.assert_array_equal(found, expected)
    assert files.weights_dtype().name == {"F32": "float32", "F16": "float16"}.get(name, "bfloat16")
    assert files.dtype("a").name == {"F16": "float16", "BF16": "bfloat16"}.get(name, "float32")


def test_metadata_and_table(tmp_path):
    metadata, files = open_gguf(make.gguf_file(tmp_path / "m.gguf"))
    assert metadata["llama.block_count"] == make.L
    assert files.shape("blk.1.ffn_down.weight") == (make.D, make.F)
    arrays = make.hf_arrays()
    found = files.read("blk.1.ffn_down.weight", F32)
    np.testing.assert_array_equal(found, arrays["model.layers.1.mlp.down_proj.weight"])


def test_metadata_only(tmp_path):
    path = make.gguf_file(tmp_path / "m.gguf")
    metadata_only(path, tmp_path / "tokenizer.gguf")
    assert read_metadata(tmp_path / "tokenizer.gguf") == read_metadata(path)
    assert (tmp_path / "tokenizer.gguf").stat().st_size < path.stat().st_size / 10
    with pytest.raises(CheckpointError, match="tokenizer.gguf: holds no tensors: give the model's"):
        open_gguf(tmp_path / "tokenizer.gguf")


def test_type_without_decoder(tmp_path):
    raw = np.zeros((2, 8), np.uint8)
    path = raw_gguf(tmp_path / "x.gguf", {"ids": (gguf.GGMLQuantizationType.I8, raw)})
    _, files = open_gguf(path)
    with pytest.raises(CheckpointError, match=r"tensor 'ids' has type I8, which can't be read"):
        files.read("ids", F32)


def test_split_file(tmp_path):
    path = make.gguf_file(tmp_path / "m.gguf", split__count=3)
    with pytest.raises(CheckpointError, match=r"one of 3 parts of a split GGUF: join them"):
        open_gguf(path)


def minimal(name=b"w", dims=(4,), kind=0, offset=0, count=1, data=bytes(16), rows=1) -> bytes:
    """A GGUF v3 written by hand: no metadata, `rows` table entries, aligned data."""
    row = struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
    row += b"".join(struct.pack("<Q", dim) for dim in dims) + struct.pack("<IQ", kind, offset)
    head = b"GGUF" + struct.pack("<IQQ", 3, count, 0) + row * rows
    return head + bytes(-len(head) % 32) + data


DAMAGED = {
    "empty": (b"", "too short for a GGUF header"),
    "magic": (b"PK" + minimal()[2:], "not a GGUF file"),
    "version": (minimal()[:4] + b"\x07" + minimal()[5:], "GGUF version 7; versions 2 and 3"),
    "tensor count": (minimal(count=1 << 62), "4611686018427387904 tensors, more than the file"),
    "table cut": (minimal()[:56], "ends after the file: it is cut or damaged"),
    "name": (minimal(name=b"\xff"), "the string is not UTF-8"),
    "twice": (minimal(count=2, rows=2, data=bytes(64)), "tensor 'w' appears twice"),
    "dimensions": (minimal(dims=(1,) * 5), "tensor 'w' has 5 dimensions; 1 to 4"),
    "no dimensions": (minimal(dims=()), "tensor 'w' has 0 dimensions"),
    "zero": (minimal(dims=(4, 0)), "sizes must be positive"),
    "huge": (minimal(dims=(1 << 62, 1 << 62)), "would end at byte"),
    "type": (minimal(kind=999), "tensor 'w' has type 999, which gguf .* doesn't know"),
    "blocks": (minimal(dims=(20,), kind=2), "the last a multiple of 32"),
    "offset": (minimal(offset=1 << 40), r"tensor 'w' would end at byte 1\d+ of 80"),
    "cut": (minimal()[:-1], "tensor 'w' would end at byte 80 of 79: the file is cut"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    content, fault = DAMAGED[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad.gguf: .*{fault}"):
        open_gguf(path)


def test_hand_written_file_is_read(tmp_path):
    path = tmp_path / "good.gguf"
    path.write_bytes(minimal(data=np.float32([1, 2, 3, 4]).tobytes()))
    _, files = open_gguf(path)
    assert files.read("w", F32).tolist() == [1, 2, 3, 4]


def test_overlap(tmp_path):
    path = raw_gguf(
        tmp_path / "x.gguf",
        {n: (gguf.GGMLQuantizationType.F32, np.zeros((4, 32), np.uint8)) for n in "ab"},
    )
    content = path.read_bytes()
    assert content.count(struct.pack("<IQ", 0, 128)) == 1  # the type and offset of the second
    path.write_bytes(content.replace(struct.pack("<IQ", 0, 128), struct.pack("<IQ", 0, 64)))
    with pytest.raises(CheckpointError, match="tensors 'a' and 'b' overlap"):
        open_gguf(path)


def test_alignment(tmp_path):
    path = make.gguf_file(tmp_path / "m.gguf", general__alignment=0)
    with pytest.raises(CheckpointError, match=r"general.alignment is 0; a whole number"):
        open_gguf(path)


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    return make.gguf_file(tmp_path_factory.mktemp("gguf") / "m.gguf", "Q8_0").read_bytes()


BIG = st.one_of(st.integers(0, 300), st.sampled_from([2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]))
MUTATIONS = st.one_of(
    st.tuples(
        st.just("bytes"),
        st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    ),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("number"), st.tuples(st.floats(0, 1), BIG)),
)


def mutated(content: bytes, mutation) -> bytes:
    """Bytes flipped, the file cut, or a 64-bit count inflated, mostly in the header."""
    what, how = mutation
    result, header = bytearray(content), 3000
    if what == "bytes":
        for place, value in how:
            result[int(place * header)] = value
    elif what == "cut":
        del result[int(how * len(content)) :]
    else:
        place = int(how[0] * header)
        result[place : place + 8] = how[1].to_bytes(8, "little")
    return bytes(result)


@settings(
    max_examples=1000,
    deadline=2000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutation=MUTATIONS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mutated types decode to any bits
def test_mutated_headers_end_in_success_or_a_clear_error(tmp_path, content, mutation):
    path = tmp_path / "mutated.gguf"
    path.write_bytes(mutated(content, mutation))
    try:
        _, files = open_gguf(path)
        assert sum(tensor.nbytes for tensor in files.tensors.values()) <= len(content)
        for name in files.names:
            files.read(name, F32)
    except CheckpointError as error:
        assert "mutated.gguf" in str(error)


def test_most_of_the_mutated_region_is_header(content):
    assert content.find(b"output.weight") < 3000 < len(content) / 4
