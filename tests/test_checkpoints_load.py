"""`load`: one result from every form of path, one error for every name that doesn't fit."""

import json
import subprocess
import sys
from pathlib import Path

import checkpoint_makers as make
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models

from lepton_jax.checkpoints import load as load_module
from lepton_jax.checkpoints import locate
from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.checkpoints.loaded import weight_dtype
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.checkpoints.stream import open_foreign
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.tensors import QTensor


def by_path(loaded) -> dict:
    return dict(zip(loaded.model.specs, loaded.leaves, strict=True))


def assert_same(first, second):
    assert list(first.model.specs) == list(second.model.specs)
    for path, leaf in by_path(first).items():
        np.testing.assert_array_equal(leaf, by_path(second)[path], err_msg=path)


def test_hugging_face_directory(tmp_path):
    loaded = load(make.hf_folder(tmp_path))
    arrays, leaves = make.hf_arrays(), by_path(loaded)
    assert loaded.config.family == "llama" and loaded.config.num_layers == make.L
    np.testing.assert_array_equal(leaves["embed"], arrays["model.embed_tokens.weight"])
    gate, up = (arrays[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    np.testing.assert_array_equal(leaves["layers.1.gate_up"], [gate, up])
    assert loaded.bytes == sum(4 * spec.size for spec in loaded.model.specs.values())
    assert loaded.tokenizer_source == tmp_path
    assert loaded.model.dtype == loaded.model.activation_dtype == jnp.float32
    assert all(isinstance(leaf, jax.Array) for leaf in loaded.leaves)


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_every_family_as_its_key_map_says(tmp_path, case):
    weights = tiny_models.FOLDER / tiny_models.CASES[case]["weights"]
    for file in (tiny_models.FOLDER / case / "config.json", weights / "model.safetensors"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    leaves = by_path(load(tmp_path))
    expected = tiny_models.load(case).leaves
    assert set(leaves) == set(expected)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_shards_give_the_same(tmp_path):
    whole = load(make.hf_folder(tmp_path / "whole"))
    assert_same(whole, load(make.sharded_folder(tmp_path / "parts", make.hf_arrays())))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_gguf_gives_the_same(tmp_path, kind):
    path = make.gguf_file(tmp_path / "m.gguf", kind)
    loaded = load(str(path))
    assert_same(load(make.hf_folder(tmp_path / "hf")), loaded)
    assert loaded.tokenizer_source == path


def test_quantized_gguf_is_close(tmp_path):
    whole = by_path(load(make.hf_folder(tmp_path / "hf")))
    for path, leaf in by_path(load(make.gguf_file(tmp_path / "m.gguf", "Q8_0"))).items():
        np.testing.assert_allclose(leaf, whole[path], atol=1 / 200, err_msg=path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", jnp.bfloat16, np.float32])
def test_asked_dtype(tmp_path, dtype):
    loaded = load(make.hf_folder(tmp_path), dtype=dtype)
    leaves = by_path(loaded)
    assert leaves["layers.0.qkv"].dtype == jnp.dtype(dtype)
    assert leaves["layers.0.attn_norm"].dtype == jnp.float32
    assert loaded.model.activation_dtype == loaded.model.dtype == jnp.dtype(dtype)
    mixed = load(tmp_path, dtype=dtype, activation_dtype="float32").model
    assert (mixed.dtype, mixed.activation_dtype) == (jnp.dtype(dtype), jnp.float32)
    exact = make.hf_arrays()["model.layers.0.self_attn.o_proj.weight"]
    np.testing.assert_array_equal(leaves["layers.0.out"], exact)


def test_auto_dtype(monkeypatch):
    f32, bf16, f16 = map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16))
    for platform, own, expected in (
        ("cpu", bf16, f32),
        ("gpu", bf16, bf16),
        ("gpu", f16, f16),
        ("tpu", f16, bf16),
        ("tpu", f32, f32),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        assert weight_dtype("auto", own) == expected
        assert weight_dtype("float32", own) == f32
        assert weight_dtype("auto", own, platform="cpu") == f32  # for another machine's device


def test_float16_on_a_tpu_is_refused_by_name():
    assert weight_dtype("float16", np.dtype(np.float32)) == np.float16
    with pytest.raises(CheckpointError, match=r"^model.dtype=float16: a TPU has none; allowed are"):
        weight_dtype("float16", np.dtype(np.float32), platform="tpu")


def test_unknown_dtypes(tmp_path):
    folder = make.hf_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"^dtype='int8' is unknown: allowed are auto, flo"):
        load(folder, dtype="int8")
    with pytest.raises(CheckpointError, match=r"activation_dtype='fp8' is unknown: allowed are fl"):
        load(folder, activation_dtype="fp8")


def test_compress_and_progress(tmp_path):
    seen, calls = [], []

    def compress(path, spec, array):
        seen.append((path, spec.shape, array.shape))
        return QTensor(array.astype(jnp.int8), array[..., 0]) if spec.inputs == 1 else array

    folder = make.hf_folder(tmp_path)
    loaded = load(folder, compress=compress, progress=lambda *call: calls.append(call))
    specs = loaded.model.specs
    assert seen == [(path, spec.shape, spec.shape) for path, spec in specs.items()]
    assert isinstance(by_path(loaded)["layers.0.down"], QTensor)
    total = sum(array.nbytes for array in make.hf_arrays().values())
    assert [name for _, _, name in calls] == list(specs)
    assert calls[-1][:2] == (total, total) and all(t == total for _, t, _ in calls)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)


def test_out_of_memory_says_what_the_model_needs(tmp_path):
    def fails_with(error):
        def compress(path, spec, array):
            raise error

        return compress

    folder = make.hf_folder(tmp_path)
    full = r"out of memory at embed: uncompressed, the model takes 0.00 GiB in float32. Use model.d"
    for error in (MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 byte")):
        with pytest.raises(CheckpointError, match=full):
            load(folder, compress=fails_with(error))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        load(folder, compress=fails_with(jax.errors.JaxRuntimeError("INTERNAL: other")))


def test_describe_reads_no_weights(tmp_path, monkeypatch):
    folder = make.hf_folder(tmp_path)
    expected = load(folder).model.specs
    monkeypatch.setattr("lepton_jax.checkpoints.source.TensorFiles.read", None)
    assert describe(folder).specs == expected
    assert describe(folder, dtype="bfloat16").specs["embed"].dtype == jnp.bfloat16


def test_all_wrong_names_in_one_error(tmp_path):
    arrays = make.hf_arrays()
    del arrays["model.norm.weight"]
    del arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["extra.weight"] = arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(
        3, np.float32
    )
    arrays["model.language_model.layers.0.mlp.up_proj.weight"] = np.ones(3, np.float32)
    with pytest.raises(CheckpointError) as error:
        load(make.hf_folder(tmp_path, arrays))
    text = str(error.value)
    assert str(tmp_path) in text and "don't fit a llama model of 2 layers" in text
    assert "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in text
    assert (
        "duplicate: model.language_model.layers.0.mlp.up_proj.weight, "
        "model.layers.0.mlp.up_proj.weight;" in text
    )
    assert "left over: extra.weight." in text
    assert "rotary" not in text


def test_many_wrong_names_are_grouped(tmp_path):
    with pytest.raises(CheckpointError, match=r"missing: model.layers.\*.input_layernorm.weight \("
                       r"20 of them\), .*up_proj.weight \(20 of them\)"):  # fmt: skip
        load(make.hf_folder(tmp_path, num_hidden_layers=22))


def test_tied_head_in_the_file_is_left(tmp_path):
    tied = load(make.hf_folder(tmp_path / "a", tie_word_embeddings=True))
    assert "head" not in tied.model.specs


def test_sizes_that_do_not_fit(tmp_path):
    arrays = make.hf_arrays()
    arrays["model.layers.0.mlp.down_proj.weight"] = np.ones((make.D, make.F + 1), np.float32)
    with pytest.raises(CheckpointError, match=r"don't fit: layers.0.down \(32, 64\) from model\S+ "
                       r"\(32, 65\)"):  # fmt: skip
        load(make.hf_folder(tmp_path / "size", arrays))
    arrays["model.layers.0.mlp.down_proj.weight"] = np.ones((make.F, make.D), np.float32)
    with pytest.raises(
        CheckpointError, match=r"layers.0.down became \(64, 32\) instead of \(32, 64"
    ):
        load(make.hf_folder(tmp_path / "shape", arrays))
    arrays = make.hf_arrays()
    arrays["model.layers.0.mlp.up_proj.weight"] = np.ones((make.D, make.F), np.float32)
    with pytest.raises(CheckpointError, match=r"layers.0.gate_up can't be made of \S+gate_proj"):
        load(make.hf_folder(tmp_path / "stack", arrays))


def test_needed_tensor_of_an_integer_type(tmp_path):
    arrays = make.hf_arrays() | {"model.norm.weight": np.ones(make.D, np.int64)}
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' has type I64"):
        load(make.hf_folder(tmp_path, arrays))


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{", "config.json: the file is no valid JSON"),
        ("[]", "config.json: the file must be a JSON object"),
        ('{"model_type": "bert"}', "is not supported; supported: "),
        (json.dumps(make.HF_CONFIG | {"new_key": 1}), "new_key = 1"),
        (json.dumps(make.HF_CONFIG | {"hidden_size": "32"}), "hidden_size is '32'"),
        (json.dumps(make.HF_CONFIG | {"num_hidden_layers": 1 << 40}), "than its 21 tensors allow"),
    ],
)
def test_configs_that_do_not_fit(tmp_path, text, fault):
    folder = make.hf_folder(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert str(tmp_path) in str(error.value) and fault in str(error.value)


def test_gguf_configs_that_do_not_fit(tmp_path):
    path = make.gguf_file(tmp_path / "new.gguf", llama__surprise=4)
    with pytest.raises(CheckpointError, match=r"new.gguf: .*surprise = 4"):
        load(path)
    content = make.gguf_file(tmp_path / "m.gguf").read_bytes()
    count = b"llama.block_count" + (4).to_bytes(4, "little")
    (tmp_path / "deep.gguf").write_bytes(
        content.replace(count + b"\x02\x00\x00\x00", count + b"\xff\xff\xff\xff")
    )
    with pytest.raises(CheckpointError, match=r"block_count is 4294967295, more than its 21 tens"):
        load(tmp_path / "deep.gguf")


@pytest.mark.parametrize("size", range(0, 1400, 41))
def test_gguf_with_one_changed_number_loads_or_says_why(tmp_path, size):
    content = bytearray(make.gguf_file(tmp_path / "m.gguf").read_bytes())
    content[24 + size : 28 + size] = (0x7FFFFFFF).to_bytes(4, "little")
    (tmp_path / "bad.gguf").write_bytes(content)
    try:
        load(tmp_path / "bad.gguf")
    except CheckpointError as error:
        assert "bad.gguf" in str(error)


def test_fingerprint(tmp_path):
    arrays = make.hf_arrays()
    prints = [load(make.hf_folder(tmp_path / name, arrays)).fingerprint for name in "ab"]
    assert prints[0] == prints[1] and len(prints[0]) == 16
    prints.append(load(tmp_path / "a", dtype="bfloat16").fingerprint)
    assert prints[2] == prints[0]  # of the file, not of how it was loaded
    prints.append(load(make.hf_folder(tmp_path / "c", arrays, rope_theta=5e5)).fingerprint)
    other = arrays | {"model.embed_tokens.weight": arrays["model.embed_tokens.weight"] + 1}
    prints.append(load(make.hf_folder(tmp_path / "d", other)).fingerprint)
    halves = make.hf_arrays(np.float16)
    prints.append(load(make.hf_folder(tmp_path / "e", halves)).fingerprint)
    assert len(set(prints[2:])) == 4


def test_paths_of_no_known_kind(tmp_path):
    for name in ("x.bin", "w.safetensors"):
        (tmp_path / name).write_bytes(b"x")
    forms = "a Hugging Face directory .*a .gguf file.*hf:org/name, .*demo:smollm2, demo:gemma3-270m"
    for path, fault in (
        (tmp_path / "nowhere", rf"nowhere' doesn't exist; accepted are {forms}"),
        ("", rf"'' doesn't exist; accepted are {forms}"),
        (tmp_path, rf"is a directory without config.json or manifest.json; accepted are {forms}"),
        (tmp_path / "x.bin", rf"is of no known kind; accepted are {forms}"),
        (tmp_path / "w.safetensors", rf"one file of a checkpoint: give its directory, {tmp_path}"),
        ("demo:gpt5", "demo model 'gpt5' is unknown: allowed are 'smollm2', 'gemma3-270m'"),
        ("hf:gpt2", "'hf:gpt2' must be hf:org/name"),
        ("published:llama-3.1-8b", "without weights: plan takes it"),
        ("gs://bucket/model", r"^'gs://bucket/model' is an address, and models are .*shared disk"),
        ("~nobody-here/model", r"^'~nobody-here/model' begins with the home of a user who isn"),
    ):
        with pytest.raises(CheckpointError, match=fault):
            load(path)
    (tmp_path / "m.gguf").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"Did you mean \S+m.gguf\?"):
        load(tmp_path)


class EntryNotFoundError(Exception):
    """As huggingface_hub calls it."""


def test_hub(tmp_path, monkeypatch):
    folder = make.hf_folder(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    asked = {}

    class Hub:
        @staticmethod
        def snapshot_download(name, **options):
            asked.update(options, name=name)
            if name == "org/gone":
                raise RuntimeError("404")
            return str(tmp_path / "empty" if name == "org/tiny-GGUF" else folder)

        @staticmethod
        def hf_hub_download(name, file):
            assert name == "org/tiny-GGUF"
            if file != "q8/m.gguf":
                raise EntryNotFoundError("404")
            return str(make.gguf_file(tmp_path / "m.gguf"))

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    assert load("hf:org/tiny-GGUF/q8/m.gguf").tokenizer_source == tmp_path / "m.gguf"
    for ask in (load, locate.hub_config):
        with pytest.raises(CheckpointError, match="give one of them, hf:org/tiny-GGUF/FILE.gguf"):
            ask("hf:org/tiny-GGUF")
    for path in ("hf:tiny", "hf:org/", "hf:org/tiny/config.json", "hf:tiny.gguf"):
        with pytest.raises(CheckpointError, match="must be hf:org/name or hf:org/name/file.gguf"):
            load(path)
    assert load("hf:org/tiny").tokenizer_source == folder
    assert asked["name"] == "org/tiny" and "*.safetensors" in asked["allow_patterns"]
    with pytest.raises(CheckpointError, match=r"'hf:org/gone' can't be fetched: RuntimeError: 404"):
        load("hf:org/gone")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"needs huggingface_hub: pip install 'lepton_jax\[h"):
        load("hf:org/tiny")


def test_demo_path(tmp_path, monkeypatch):
    path = make.gguf_file(tmp_path / "m.gguf")
    monkeypatch.setattr(locate, "demo_model", {"smollm2": path}.get)
    assert load("demo:smollm2").tokenizer_source == path
    assert load_module.load is load


def test_unreadable_files_are_named(tmp_path):
    folder = make.hf_folder(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config.json: the file is no valid JSON"):
        open_foreign("hf", folder)


MEASURE = """
import sys, jax, jax.numpy as jnp
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.compression.presets import compressor, preset_rules

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return int(line.split()[1]) * 1024

specs = describe(sys.argv[1]).specs
jax.block_until_ready(jax.jit(jnp.negative)(jnp.ones(8)))
compress = compressor(preset_rules("int8"), specs) if sys.argv[2:] else None
base = status("VmRSS")
loaded = load(sys.argv[1], compress=compress)
print(status("VmHWM") - base, loaded.bytes, max(spec.nbytes for spec in specs.values()))
"""


def measure(*arguments) -> tuple[int, int, int]:
    """Bytes of a fresh process's peak while it loads, of the model, of its largest weight."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, model, largest = map(int, done.stdout.split())
    return peak, model, largest


@pytest.mark.slow
def test_host_memory_while_loading(smollm2_path):
    peak, model, largest = measure(smollm2_path, "int8")
    assert model < 140e6  # int8: the bound below would be loose for float32
    assert peak <= model + 2 * largest, f"{peak=:,} {model=:,} {largest=:,}"


@pytest.mark.slow
def test_host_memory_while_loading_shards_and_what_was_saved(tmp_path):
    with make.medium_sized() as config:
        arrays = make.hf_arrays(ml_dtypes.bfloat16)
        shards = make.sharded_folder(tmp_path / "shards", arrays, **config)
    saved = tmp_path / "saved"
    rules = preset_rules("int8")
    save(saved, load(shards, compress=compressor(rules, describe(shards).specs)))
    for arguments in ((shards, "int8"), (saved,)):
        peak, model, largest = measure(*arguments)
        assert model < 90e6
        assert peak <= model + 2 * largest, f"{arguments} {peak=:,} {model=:,} {largest=:,}"
