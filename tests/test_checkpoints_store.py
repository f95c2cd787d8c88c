"""Our own directories: bit-exact round trips, complete or absent, damage is named."""

import gc
import json
import shutil

import checkpoint_makers as make
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_models
from compress_makers import model_folder

from lepton_jax.checkpoints.errors import CheckpointError
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.checkpoints.manifest import Manifest
from lepton_jax.checkpoints.orbax_arrays import Reader
from lepton_jax.checkpoints.orbax_store import new_directory, save
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.tensors import QTensor
from lepton_jax.text.gguf_metadata import read_metadata
from lepton_jax.text.tokenizer import load as load_tokenizer


def loaded(folder, preset="none", **options):
    make.hf_folder(folder)
    rules = preset_rules(preset)
    compress = compressor(rules, describe(folder).specs) if rules else None
    return load(folder, compress=compress, **options)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return save(folder / "saved", loaded(folder / "hf", "w8a8"))


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy to damage."""
    return shutil.copytree(saved_once, tmp_path / "saved")


@pytest.mark.parametrize("preset", ["none", "int8", "w8a8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bitwise(tmp_path, preset, dtype):
    before = loaded(tmp_path / "hf", preset, dtype=dtype)
    path = save(tmp_path / "deeper" / "saved", before)
    calls = []
    after = load(path, progress=lambda *call: calls.append(call))
    assert after.config == before.config and after.fingerprint == before.fingerprint
    assert after.model.specs == before.model.specs and after.bytes == before.bytes
    assert after.model.dtype == after.model.activation_dtype == dtype
    assert jax.tree.structure(after.leaves) == jax.tree.structure(before.leaves)  # incl. act_bits
    for ours, theirs in zip(*map(jax.tree.leaves, (after.leaves, before.leaves)), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
    assert sum(isinstance(leaf, QTensor) for leaf in after.leaves) == (
        0 if preset == "none" else 10
    )
    assert [name for _, _, name in calls] == list(after.model.specs)
    assert calls[-1][0] == calls[-1][1] == after.bytes
    assert describe(path).specs == after.model.specs


@pytest.mark.parametrize("case", tiny_models.CASES)
def test_configs_of_every_family_survive(tmp_path, case):
    config = tiny_models.read_config(case)
    manifest = Manifest(config, "float32", "bfloat16", "0" * 16, "tokenizer", {})
    (tmp_path / "manifest.json").write_text(json.dumps(manifest.to_json()))
    assert Manifest.read(tmp_path / "manifest.json") == manifest


def test_tokenizer_of_a_directory(tmp_path):
    after = load(save(tmp_path / "saved", loaded(tmp_path / "hf")))
    assert after.tokenizer_source == tmp_path / "saved" / "tokenizer"
    assert json.loads((after.tokenizer_source / "tokenizer.json").read_text()) == {"kept": True}


def test_end_tokens_and_templates_are_the_same_after_saving(tmp_path):
    folder = model_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 5}))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "#"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    after = load(save(tmp_path / "saved", load(folder)))
    for source in (folder, after.tokenizer_source):
        tokenizer = load_tokenizer(source)
        assert tokenizer.eos_ids == (5, ord("#"))
        assert tokenizer.render_chat([{"role": "user", "content": "a"}], [{}]) == "tools"


def test_tokenizer_of_a_gguf(tmp_path):
    path = make.gguf_file(tmp_path / "m.gguf")
    after = load(save(tmp_path / "saved", load(path)))
    assert after.tokenizer_source == tmp_path / "saved" / "tokenizer" / "tokenizer.gguf"
    assert read_metadata(after.tokenizer_source) == read_metadata(path)
    again = load(save(tmp_path / "again", after))  # a saved model can be saved
    assert read_metadata(again.tokenizer_source) == read_metadata(path)


def test_compress_and_cast_while_restoring(tmp_path):
    path = save(tmp_path / "saved", loaded(tmp_path / "hf"))
    rules = compressor(preset_rules("int8"), describe(path).specs)
    after = load(path, dtype="bfloat16", compress=rules)
    leaves = dict(zip(after.model.specs, after.leaves, strict=True))
    assert isinstance(leaves["layers.0.qkv"], QTensor)
    assert leaves["layers.0.attn_norm"].dtype == jnp.float32
    plain = load(path, dtype="bfloat16")
    assert plain.leaves[0].dtype == jnp.bfloat16 and plain.model.activation_dtype == jnp.bfloat16


def test_kept_float_values_are_cast_like_whole_weights(tmp_path):
    scheme = dict(prune="magnitude", pattern="2:4", storage="sparse")
    rules = [
        Rule(r".*\.down", Scheme("keep", **scheme)),
        Rule(r".*\.out", Scheme("int8", **scheme)),
    ]
    folder = make.hf_folder(tmp_path / "hf")
    sparse = load(folder, compress=compressor(rules, describe(folder).specs))
    path = save(tmp_path / "saved", sparse)
    after = load(path, dtype="bfloat16")
    leaves = dict(zip(after.model.specs, after.leaves, strict=True))
    assert leaves["layers.0.down"].values.dtype == jnp.bfloat16
    assert leaves["layers.0.out"].values.dtype == jnp.int8
    assert load(save(tmp_path / "again", after)).bytes == after.bytes


def test_a_tpu_takes_stored_float16_as_bfloat16(tmp_path):
    path = save(tmp_path / "saved", loaded(tmp_path / "hf", dtype="float16"))
    assert describe(path).dtype == jnp.float16
    model = describe(path, platform="tpu")
    assert model.dtype == model.activation_dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match=r"model.dtype=float16: a TPU has none"):
        describe(path, dtype="float16", platform="tpu")


def test_leaves_are_read_to_their_devices(saved_once, monkeypatch):
    read, found = Reader.read, set()

    def watched(*args, **options):
        tree = read(*args, **options)
        found.update(*(array.devices() for array in jax.tree.leaves(tree)))
        return tree

    monkeypatch.setattr(Reader, "read", watched)
    load(saved_once, devices=jax.devices()[2:4])
    assert found == set(jax.devices()[2:4])


def test_others_can_read_the_leaves(saved):
    tree = ocp.PyTreeCheckpointer().restore(saved / "leaves")
    assert tree["layers"]["1"]["down"]["values"].dtype == np.int8


def test_compressing_twice(saved):
    with pytest.raises(
        CheckpointError, match=r"holds compressed leaves \(embed and others\): load"
    ):
        load(saved, compress=lambda path, spec, array: array)


def test_existing_target(tmp_path, saved):
    with pytest.raises(CheckpointError, match=r"saved exists: name a new directory or remove it"):
        save(saved, loaded(tmp_path / "hf"))


@pytest.mark.parametrize("path", ["gs://bucket/saved", "~nobody-here/saved"])
def test_targets_on_no_disk_of_this_machine(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=rf"^'{path}' (is an address|begins with the home)"):
        new_directory(path)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    before = loaded(tmp_path / "hf")

    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(CheckpointError, match=r"saved can't be written: OSError: .*No space left"):
        save(tmp_path / "saved", before)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"file/saved can't be written: \w+Error"):
        save(tmp_path / "file" / "saved", before)


def edit(path, change):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGED = {
    "version": (lambda m: m.update(version=3), "version 3 is unknown; this release reads .* vers"),
    "format": (lambda m: m.pop("format"), "format None version 2 is unknown"),
    "keys": (lambda m: m.update(more=m.pop("leaves")), r"missing \['leaves'\], unknown \['more'\]"),
    "kind": (lambda m: m.update(leaves=[]), r"leaves is \[\]: it is damaged"),
    "dtype": (lambda m: m.update(dtype="int8"), "dtype 'int8' is unknown: allowed are float32"),
    "tokenizer": (lambda m: m.update(tokenizer="../x"), "tokenizer '../x' lies outside"),
    "missing": (lambda m: m["leaves"].pop("embed"), r"don't fit its config: missing \['embed'\]"),
    "extra": (lambda m: m["leaves"].update(x=m["leaves"]["embed"]), r"left over \['x'\]"),
    "shape": (
        lambda m: m["leaves"]["head"].update(shape=[1, 2]),
        r"of another shape \['head \[1, 2\] instead of \[48, 32\]'\]",
    ),
    "leaf type": (lambda m: m["leaves"]["head"].update(type="X"), "leaf 'head' is .*known are arr"),
    "leaf dtype": (
        lambda m: m["leaves"]["final_norm"].update(dtype="int4"),
        "leaf 'final_norm' is .*known",
    ),
    "leaf bits": (
        lambda m: m["leaves"]["head"]["static"].update(act_bits=4),
        "leaf 'head' can't be a QTensor of .*act_bits=4: allowed are 8",
    ),
    "leaf": (lambda m: m["leaves"].update(head=3), "leaf 'head' is 3; known are"),
    "other dtype": (
        lambda m: m["leaves"]["final_norm"].update(dtype="bfloat16"),
        r"doesn't fit manifest.json: different \['final_norm'\]",
    ),
    "field": (
        lambda m: m["config"].update(new=1),
        r"ModelConfig fields missing \[\], unknown \['n",
    ),
    "no field": (lambda m: m["config"].pop("norm_eps"), r"fields missing \['norm_eps'\]"),
    "value": (lambda m: m["config"].update(num_heads=3), "num_heads 3 is not a multiple"),
    "value type": (lambda m: m["config"].update(hidden_size="x"), "its config can't be used"),
    "real size": (lambda m: m["config"].update(hidden_size=0.5), ": no model can be built"),
    "ropes": (lambda m: m["config"].update(ropes=[{}]), "RopeConfig fields missing"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_manifests(saved, name):
    change, fault = DAMAGED[name]
    edit(saved, change)
    with pytest.raises(CheckpointError, match=rf"saved.*{fault}"):
        load(saved)


def test_manifest_that_is_no_json(saved):
    text = (saved / "manifest.json").read_bytes()
    (saved / "manifest.json").write_bytes(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"manifest.json: the file is no valid JSON"):
        load(saved)


def rewrite_leaves(saved, change):
    """Replaces the stored tree by a changed one."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.restore(saved / "leaves")
        change(tree)
        checkpointer.save(saved / "leaves", args=ocp.args.PyTreeSave(tree), force=True)


def test_leaves_that_are_not_in_the_files(saved):
    rewrite_leaves(saved, lambda tree: tree["layers"]["0"]["down"].pop("scale"))
    with pytest.raises(
        CheckpointError, match=r"fit manifest.json: missing \['layers.0.down.scale'"
    ):
        load(saved)


def test_leaves_that_nothing_lists(saved):
    rewrite_leaves(saved, lambda tree: tree.update(more=np.ones(3)))
    with pytest.raises(
        CheckpointError, match=r"leaves doesn't fit manifest.json: left over \['mor"
    ):
        load(saved)


def out_of_memory(*_args, **_options):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 byte")


@pytest.mark.parametrize("place", ["orbax_arrays.Reader.read", "orbax_store.placed"])
def test_out_of_memory_is_no_damage(saved_once, monkeypatch, place):
    monkeypatch.setattr(f"lepton_jax.checkpoints.{place}", out_of_memory)
    with pytest.raises(CheckpointError, match=r"out of memory: its leaves take 0.00 GiB. Use a l"):
        load(saved_once)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_missing_and_cut_leaf_files(saved):
    for file in (saved / "leaves").rglob("*"):
        if file.is_file() and "ocdbt" in str(file) and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match=r"leaves: (can't read|its table can't be read)"):
        load(saved)
    gc.collect()  # Orbax leaves its other reads behind, which complain when collected
    shutil.rmtree(saved / "leaves")
    with pytest.raises(CheckpointError, match=r"leaves: its table can't be read"):
        load(saved)
