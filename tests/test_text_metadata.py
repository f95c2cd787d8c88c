"""The GGUF header reader: every value type, and damaged files that end in a clear error."""

import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.text.gguf_metadata import GgufError, read_metadata

VALUES = {
    "general.architecture": "llama",
    "a.u8": 7,
    "a.i64": -5,
    "a.f64": 0.25,
    "a.flag": True,
    "a.text": "h\u00e9 \u4f60",
    "a.words": ["x", "", "\u2581y"],
    "a.floats": [0.5, -1.0],
    "a.ints": [1, 2, 3],
    "a.nested": [[1, 2], [3]],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 7)
    writer.add_int64("a.i64", -5)
    writer.add_float64("a.f64", 0.25)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", VALUES["a.text"])
    for name in ("a.words", "a.floats", "a.ints", "a.nested"):
        writer.add_array(name, VALUES[name])
    writer.add_tensor("t", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reads_every_kind_of_value(whole):
    assert read_metadata(whole) == VALUES


def test_agrees_with_the_gguf_package(whole):
    fields = gguf.GGUFReader(whole).fields
    for name in ("a.u8", "a.i64", "a.f64", "a.flag", "a.text", "a.words", "a.floats", "a.ints"):
        assert read_metadata(whole)[name] == fields[name].contents()


@settings(max_examples=500, deadline=None)
@given(data=st.data())
def test_damaged_headers_end_in_a_clear_error(whole, tmp_path_factory, data):
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, 420))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(raw)
    try:
        values = read_metadata(path)
    except GgufError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(key, str) for key in values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"GGML" + bytes(40), "starts with b'GGML'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; versions 2 and 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "more than the file holds"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99) + bytes(9), "value type 99"),
        (b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 1) + b"\xff", "not UTF-8"),
    ],
)
def test_files_that_are_no_gguf(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=message):
        read_metadata(path)
