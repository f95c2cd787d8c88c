"""safetensors: dtypes, shards, and that every damaged file is refused with its name and fault."""

import json

import checkpoint_makers as make
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.safetensors_files import open_safetensors, read_header
from lepton_jax.checkpoints.source import TensorFiles

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)


def read_all(files: TensorFiles) -> dict[str, np.ndarray]:
    return {name: files.read(name, files.dtype(name)) for name in files.names}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_of_every_float_type(tmp_path, dtype):
    arrays = make.hf_arrays(dtype)
    files = open_safetensors(make.hf_folder(tmp_path, arrays))
    assert files.weights_dtype() == dtype
    for name, array in read_all(files).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, arrays[name])
        wide = files.read(name, F32)
        np.testing.assert_array_equal(wide, arrays[name].astype(np.float32))


def test_reads_what_the_library_wrote(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([[1, -2]])}
    save_file(arrays, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    found = read_all(open_safetensors(tmp_path))
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_arrays_larger_than_a_slab(tmp_path):
    array = np.arange(700_001, dtype=np.float32)
    (tmp_path / "x.safetensors").write_bytes(make.safetensors_bytes({"a": array, "b": array[:3]}))
    files = open_safetensors(tmp_path)
    np.testing.assert_array_equal(files.read("a", F32), array)
    np.testing.assert_array_equal(files.read("b", F32), array[:3])


def test_shards(tmp_path):
    arrays = make.hf_arrays()
    files = open_safetensors(make.sharded_folder(tmp_path, arrays, shards=3))
    found = read_all(files)
    assert set(found) == set(arrays)
    for name in arrays:
        np.testing.assert_array_equal(found[name], arrays[name])


def edit_index(folder, edit):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_and_shards_that_disagree(tmp_path):
    folder = make.sharded_folder(tmp_path, make.hf_arrays())
    second = "model-00002-of-00002.safetensors"
    edit_index(folder, lambda m: m.update({"model.embed_tokens.weight": second, "extra": second}))
    with pytest.raises(CheckpointError, match=r"the index says .*00002.*'extra' is in no shard"):
        open_safetensors(folder)


def test_a_name_in_two_shards(tmp_path):
    folder = make.sharded_folder(tmp_path, make.hf_arrays())
    both = {"model.embed_tokens.weight": np.zeros((2, 2), np.float32)}
    (folder / "model-00002-of-00002.safetensors").write_bytes(make.safetensors_bytes(both))
    with pytest.raises(CheckpointError, match=r"is in model-00001-of-00002\S+ and in model-00002"):
        open_safetensors(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "gone.safetensors"])
def test_missing_shard(tmp_path, file):
    folder = make.sharded_folder(tmp_path, make.hf_arrays())
    edit_index(folder, lambda m: m.update({"model.norm.weight": file}))
    with pytest.raises(CheckpointError, match=r"index.json: names .*isn't beside it: fetch"):
        open_safetensors(folder)


@pytest.mark.parametrize("text", ['{"weight_map": {}}', '{"weight_map": [1]}', "{}"])
def test_index_without_map(tmp_path, text):
    folder = make.sharded_folder(tmp_path, make.hf_arrays())
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="needs weight_map"):
        open_safetensors(folder)


def test_no_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"it has no .safetensors file. PyTorch pickles"):
        open_safetensors(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"it has a.safetensors, b.safetensors"):
        open_safetensors(tmp_path)


def entry(**changes):
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


DATA = bytes(8)
DAMAGED = {
    "empty": (b"", "its header would take -1 of the file's 0 bytes"),
    "long header": ((1 << 60).to_bytes(8, "little") + b"{}", "its header would take 1152921504"),
    "not JSON": (make.with_header(b"{nonsense", DATA), "the header is no valid JSON"),
    "not UTF-8": (make.with_header(b"\xff\xfe{}", DATA), "the header is no valid JSON"),
    "deep": (make.with_header(b"[" * 99_999, DATA), "the header is no valid JSON"),
    "a list": (make.with_header([1], DATA), "the header must be a JSON object, found list"),
    "twice": (make.with_header(b'{"a": 1, "a": 2}', DATA), "'a' appears twice"),
    "no tensors": (make.with_header({"__metadata__": {}}, b""), "holds no tensors"),
    "entry": (make.with_header({"a": {"dtype": "F32"}}, DATA), "must have dtype, shape and"),
    "dtype": (make.with_header(entry(dtype="F31"), DATA), "dtype 'F31' is unknown, known are"),
    "list dtype": (make.with_header(entry(dtype=["F32"]), DATA), r"dtype \['F32'\] is unknown"),
    "negative": (make.with_header(entry(shape=[-2]), DATA), "shape must be a list of whole"),
    "huge": (make.with_header(entry(shape=[10**4000] * 2), DATA), "shape must be a list of whole"),
    "fraction": (make.with_header(entry(shape=[2.0]), DATA), "shape must be a list of whole"),
    "boolean": (make.with_header(entry(shape=[2, True]), DATA), "shape must be a list of whole"),
    "offsets": (make.with_header(entry(data_offsets="08"), DATA), "data_offsets must be a list"),
    "one offset": (make.with_header(entry(data_offsets=[8]), DATA), r"\[8\] don't span the 8"),
    "span": (make.with_header(entry(shape=[3]), DATA), r"don't span the 12 bytes of F32 \[3\]"),
    "dimensions": (make.with_header(entry(shape=[1] * 9), DATA), "9 dimensions, at most 8"),
    "hole": (make.with_header(entry(data_offsets=[4, 12]), bytes(12)), "begins at byte"),
    "cut": (make.with_header(entry(), DATA[:-1]), "its tensors need .* bytes and the file has"),
    "trailing": (make.with_header(entry(), bytes(9)), "its tensors need .* bytes and the file has"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(tmp_path, name):
    content, fault = DAMAGED[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"bad.safetensors: .*{fault}"):
        open_safetensors(tmp_path)


def test_type_that_is_no_weight(tmp_path):
    files = open_safetensors(
        make.hf_folder(tmp_path, {"ids": np.zeros(3, np.int64), "w": np.zeros(1, np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"tensor 'ids' has type I64, which can't be read"):
        files.read("ids", F32)


def test_no_float_tensors(tmp_path):
    files = open_safetensors(make.hf_folder(tmp_path, {"ids": np.zeros(3, np.int64)}))
    with pytest.raises(CheckpointError, match="holds no float tensors"):
        files.weights_dtype()


def test_beyond_float16(tmp_path):
    files = open_safetensors(make.hf_folder(tmp_path, {"w": np.float32([1, 7e4])}))
    with pytest.raises(CheckpointError, match=r"'w' has values outside float16's range"):
        files.read("w", np.dtype(np.float16))
    assert files.read("w", BF16)[1] == 70144


def test_file_cut_while_reading(tmp_path):
    folder = make.hf_folder(tmp_path)
    files = open_safetensors(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(5000)
    with pytest.raises(CheckpointError, match=r"model.safetensors ends within tensor"):
        read_all(files)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"can't read tensor .*No such file"):
        read_all(files)


CONTENT = make.safetensors_bytes(
    {"a": np.ones((3, 4), np.float32), "b.weight": np.ones(5, np.float16), "c": np.ones(2, BF16)}
)
HEADER = len(CONTENT) - 48 - 10 - 4
NUMBERS = st.sampled_from(["0", "-1", "18446744073709551616", "1e400", "9" * 5000, "[]", "null"])
MUTATIONS = st.one_of(
    st.tuples(
        st.just("bytes"),
        st.lists(
            st.tuples(st.integers(0, HEADER - 1), st.integers(0, 255)), min_size=1, max_size=4
        ),
    ),
    st.tuples(st.just("cut"), st.integers(0, len(CONTENT) - 1)),
    st.tuples(st.just("length"), st.integers(0, 2**64 - 1)),
    st.tuples(st.just("number"), st.tuples(st.integers(0, 30), NUMBERS)),
)


def mutated(mutation) -> bytes:
    what, how = mutation
    content = bytearray(CONTENT)
    if what == "bytes":
        for place, value in how:
            content[place] = value
    elif what == "cut":
        del content[how:]
    elif what == "length":
        content[:8] = how.to_bytes(8, "little")
    else:
        text = CONTENT[8:HEADER].decode()
        digits = [i for i, c in enumerate(text) if c.isdigit() and not text[i - 1].isdigit()]
        place = digits[how[0] % len(digits)]
        rest = text[place:].lstrip("0123456789")
        return make.with_header((text[:place] + how[1] + rest).encode(), CONTENT[HEADER:])
    return bytes(content)


@settings(
    max_examples=1000,
    deadline=2000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(mutation=MUTATIONS)
def test_mutated_headers_end_in_success_or_a_clear_error(tmp_path, mutation):
    path = tmp_path / "mutated.safetensors"
    content = mutated(mutation)
    path.write_bytes(content)
    try:
        files = TensorFiles(path, read_header(path))
        assert sum(tensor.nbytes for tensor in files.tensors.values()) <= len(content)
        read_all(files)
    except CheckpointError as error:
        assert "mutated.safetensors" in str(error)
