"""Plans of released models from shapes, of tiny ones compiled, and what is refused."""

import dataclasses
import json
import sys
import types

import checkpoint_makers as make
import pytest
from checkpoint_makers import gguf_file
from compress_makers import model_folder

from lepton_jax.checkpoints import locate
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.checkpoints.orbax_store import save
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.compression.rules import Rule
from lepton_jax.compression.scheme import Scheme
from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    MeshSection,
    ModelSection,
    PlanSection,
    PoolSection,
    RunConfig,
)
from lepton_jax.planning import remedies as remedies_module
from lepton_jax.planning.chips import TPUS, Chip
from lepton_jax.planning.from_config import served_of
from lepton_jax.planning.memory import full_sizes, memory_of
from lepton_jax.planning.plan import budget_of, make_plan
from lepton_jax.planning.programs import Program
from lepton_jax.planning.remedies import remedies
from lepton_jax.planning.report import as_json, headline, page, text, verdict
from lepton_jax.planning.search import search
from lepton_jax.planning.traffic import Traffic

TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "num_hidden_layers": 2,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def config(path="published:llama-3.1-8b", topology="v5e:1x1", *, preset="int8", **fields):
    engine = {"rows": 32, "max_len": 1024} | fields.pop("engine", {})
    plan = {"topology": topology, "compile": False} | fields.pop("plan", {})
    return RunConfig(
        model=ModelSection(path=str(path)),
        compression=CompressionSection(preset=preset, **fields.pop("compression", {})),
        engine=EngineSection(**engine),
        mesh=MeshSection(**fields.pop("mesh", {})),
        plan=PlanSection(**plan),
    )


@pytest.fixture
def tiny(tmp_path):
    """A directory that holds a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_llama_8b_in_int8_fits_a_v5e_chip_and_says_so_twice_alike():
    plan = make_plan(config())
    assert plan.fits and "GiB to spare" in verdict(plan)
    assert plan.memory.weights == pytest.approx(8.04e9, rel=0.01)  # a byte for each parameter
    # 2 (k and v) x 32 layers x 8 heads x 128 x 2 bytes, for 32 rows of 17 pages and the null page
    assert plan.memory.cache == 131072 * 64 * (32 * 17 + 1)
    assert plan.step_seconds == pytest.approx((7.51e9 + 32 * 1024 * 131072) / 819e9, rel=0.01)
    assert json.dumps(as_json(plan)) == json.dumps(as_json(make_plan(config())))
    assert plan.largest_rows > 32 and plan.largest_len > 1024


def test_traffic_of_a_compiled_program_counts_where_it_leaves_the_cache_out():
    plan = make_plan(config())
    cost = plan.decode_cost
    moved = Traffic(read=8 * (cost.weight_bytes + 10**9))  # in a block of eight steps
    program = Program("decode", 8, plan.memory, moved, seconds=1.0, text="")
    compiled = dataclasses.replace(plan, decode=program)
    assert compiled.step_seconds == pytest.approx(cost.seconds + 1e9 / plan.chip.bandwidth)
    for platform in ("gpu", "cpu"):  # 1 GB of this is the cache, which `cost` has
        there = dataclasses.replace(
            plan.target, chip=dataclasses.replace(plan.chip, platform=platform)
        )
        elsewhere = dataclasses.replace(compiled, target=there)
        assert elsewhere.step_seconds == cost.seconds


def test_what_does_not_fit_says_by_how_much_and_each_remedy_fits():
    asked = config(preset="none")
    plan = make_plan(asked)
    short = (plan.memory.total - budget_of(plan.chip)) / 2**30
    assert short > 0 and f"does not fit, {short:.2f} GiB short" in verdict(plan)
    ways = remedies(plan)
    assert "compression.preset=int8" in ways
    assert "mesh.model=2 with plan.topology=v5e:2x2" in ways
    fewer = make_plan(config(preset="none", topology="v6e:1x1", engine={"rows": 128}))
    rows, length, *_ = remedies(fewer)
    for way in (rows, length):
        name, value = way.removeprefix("engine.").split("=")
        changed = {"rows": 128, name: int(value)}
        assert make_plan(config(preset="none", topology="v6e:1x1", engine=changed)).fits


def test_meshes_that_cannot_have_the_asked_cache_are_passed_over():
    """int8 in pages of 16 saves nothing with one kv head a device, as 70B has on eight."""
    small = {"kv_dtype": "int8", "page_size": 16, "rows": 16}
    plan = make_plan(config("published:llama-3.1-70b", engine=small))
    assert not plan.fits and remedies(plan)
    assert json.loads(json.dumps(as_json(plan)))  # and whole bytes
    assert isinstance(plan.decode_cost.cache_bytes, int)
    found = search(config("published:llama-3.1-8b", "", engine=small, plan={"chips": ("v5e",)}))
    assert found and all(f.shards < 8 for f in found)
    with pytest.raises(ValueError, match="pages of 4, .* not of 48: set engine.page_size"):
        search(config("published:llama-3.1-8b", "", engine=small | {"page_size": 48}))


def test_remedies_on_this_machine_need_no_more_than_it_has(monkeypatch):
    monkeypatch.setattr(remedies_module, "_holds", lambda *_: True)
    asked = config(preset="int8", topology="")
    plan = dataclasses.replace(make_plan(asked), largest_rows=0, largest_len=0)
    assert "mesh.model=2" in remedies(plan)  # of eight, each with its part of the memory
    gpus = (types.SimpleNamespace(platform="gpu"),) * 2
    plan = dataclasses.replace(plan, target=dataclasses.replace(plan.target, devices=gpus))
    assert "mesh.model=2" in remedies(plan)
    assert not any("mesh.model=4" in way for way in remedies(plan))


def test_devices_share_a_model_and_the_rest_are_replicas():
    plan = make_plan(config("published:llama-3.1-70b", "v5p:2x2x1", mesh={"model": 2}))
    assert plan.fits and plan.replicas == 2
    assert plan.memory.weights == pytest.approx(70.6e9 / 2, rel=0.01)
    assert plan.tokens_per_second == pytest.approx(2 * 32 / plan.step_seconds)
    assert headline(plan).endswith("mesh.model=2, 2 replicas")
    one = make_plan(config(topology="v5e:2x4", mesh={"data": 2}))
    assert one.replicas == 2 and one.fits


def test_several_hosts_make_one_mesh_or_replicas_within_a_host():
    mesh = make_plan(config("published:llama-3.1-70b", "v5e:4x4", mesh={"model": 16}))
    assert headline(mesh).endswith("mesh.model=16, 1 replica on 4 hosts by hosts.coordinator")
    within = make_plan(config(topology="v5e:4x4", mesh={"model": 4}))
    assert headline(within).endswith("mesh.model=4, 4 replicas on 4 hosts by pool.ray")
    with pytest.raises(ValueError, match=r"mesh\.model=8 can't be started on v5e:4x4: its 4 hosts"):
        make_plan(config("published:llama-3.1-70b", "v5e:4x4", mesh={"model": 8}))
    small = make_plan(config("published:llama-3.1-70b", "v5e:4x4", mesh={"model": 4}))
    assert "mesh.model=8 with plan.topology=v5e:2x4" in remedies(small)
    searched = {"chips": ("v5e",), "presets": ("int4",), "target": 5000.0}
    for found in search(config("published:llama-3.1-70b", "", plan=searched)):
        devices = found.shards * found.replicas
        assert found.hosts > 1 and found.shards in (1, 2, 4, devices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": {"model": 8}}, r"mesh\.model=8 does not divide the 1 devices of v5e:1x1"),
        ({"mesh": {"data": 2}}, r"mesh\.data=2 x mesh\.model=1 needs 2 devices, and v5e:1x1 has 1"),
        ({"path": "published:llama-9-8b"}, "near are llama-3"),
        ({"path": "nowhere/config.json"}, "there is no such file"),
        ({"path": "nowhere"}, "doesn't exist; accepted are"),
        ({"path": "gs://bucket/model"}, "'gs://bucket/model' is an address"),
        ({"engine": {"max_len": 10**6}}, r"engine\.max_len=1000000 is more than the model's"),
        ({"topology": "v5e:3x3"}, "v5e comes in slices of"),
        ({"engine": {"cache_share": 0.5}}, r"engine\.cache_share=0\.5: a plan is of devices"),
        ({"engine": {"speculation": "draft"}}, r"speculation='draft': a plan is of one model"),
        ({"compression": {"drop_layers": 4}}, r"drop_layers=4 needs calibration"),
    ],
)
def test_bad_input_is_refused_with_the_field_to_change(change, message):
    with pytest.raises(ValueError, match=message):
        make_plan(config(**change))


def test_a_config_file_is_enough(tiny):
    plan = make_plan(config(tiny))
    assert make_plan(config(tiny / "config.json")).memory == plan.memory
    assert str(plan.served.kv_dtype) == "bfloat16"


def test_of_a_hub_model_only_the_config_is_fetched(tiny, monkeypatch):
    fetched = []

    class Hub:
        """Without `snapshot_download`."""

        @staticmethod
        def hf_hub_download(name, file):
            fetched.append((name, file))
            if name == "org/gone":
                raise RuntimeError("404")
            return str(tiny / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    locate.hub_config.cache_clear()
    assert make_plan(config("hf:org/tiny")).memory == make_plan(config(tiny)).memory
    assert search(config("hf:org/tiny", "", plan={"chips": ("v5e",)}))[0].topology == "v5e:1x1"
    assert fetched == [("org/tiny", "config.json")]  # by both
    with pytest.raises(ValueError, match=r"'hf:org/gone' can't be fetched: RuntimeError: 404"):
        make_plan(config("hf:org/gone"))


def test_a_saved_model_is_planned_as_it_is_stored(tmp_path):
    model_folder(tmp_path / "model")
    compress = compressor(preset_rules("int8"), describe(tmp_path / "model").specs)
    loaded = load(tmp_path / "model", dtype="bfloat16", compress=compress)
    save(tmp_path / "small", loaded)
    engine = {"max_len": 64}
    stored = make_plan(config(tmp_path / "small", preset="none", engine=engine))
    assert stored.memory.weights == loaded.bytes
    assert make_plan(config(tmp_path / "model", engine=engine)).memory == stored.memory
    save(tmp_path / "plain", load(tmp_path / "model", dtype="bfloat16"))
    assert make_plan(config(tmp_path / "plain", engine=engine)).memory == stored.memory
    with pytest.raises(ValueError, match=r"small holds compressed leaves \(embed and others\)"):
        make_plan(config(tmp_path / "small", engine=engine))
    asked = config(tmp_path / "small", "", preset="none", engine=engine)
    assert {found.preset for found in search(asked)} == {"none"}
    with pytest.raises(ValueError, match=r"plan.presets=.*holds compressed leaves, .*add none"):
        search(dataclasses.replace(asked, plan=PlanSection(presets=("int8",))))


def test_weights_have_the_dtype_that_loading_there_gives(tmp_path):
    cpu = Chip("by hand", 1 << 30, bandwidth=1.0, float32=1.0, bf16=1.0, int8=1.0, platform="cpu")
    path = make.gguf_file(tmp_path / "model.gguf", "BF16")
    here = config(path, "", preset="none")
    assert served_of(here, cpu).model.dtype == "float32"
    assert served_of(here, TPUS["v5e"]).model.dtype == "bfloat16"
    save(tmp_path / "saved", load(path, dtype="bfloat16"))
    saved = served_of(config(tmp_path / "saved", "", preset="none"), cpu)
    assert saved.model.dtype == "bfloat16" and saved.model.activation_dtype == "float32"


def test_pages_that_do_not_fit_are_named_and_nothing_that_was_asked():
    plan = make_plan(config(engine={"num_pages": 200_000}))
    assert not plan.fits and remedies(plan)[0] == "engine.num_pages=0"
    assert "engine.rows" not in verdict(plan) and "engine.max_len" not in verdict(plan)
    fewer = remedies(make_plan(config(engine={"num_pages": 200_000, "rows": 256})))[0]
    rows = int(fewer.removeprefix("engine.rows=").removesuffix(" with engine.num_pages=0"))
    assert make_plan(config(engine={"rows": rows})).fits


def test_what_the_compiler_refuses_is_not_called_a_remedy():
    plan = dataclasses.replace(make_plan(config()), refusal="needs more than there is")
    assert not any("engine." in way for way in remedies(plan))


def test_a_sparse_saved_model_is_planned_in_the_dtype_that_is_asked_for(tmp_path):
    folder = model_folder(tmp_path / "model")
    pruned = dict(prune="magnitude", pattern="2:4", storage="sparse")
    rules = [Rule(r".*\.down", Scheme("keep", **pruned)), Rule(r".*\.out", Scheme(**pruned))]
    compress = compressor(rules, describe(folder).specs)
    save(tmp_path / "small", load(folder, compress=compress))
    asked = config(preset="none", engine={"max_len": 64})
    model = ModelSection(path=str(tmp_path / "small"), dtype="bfloat16")
    plan = make_plan(dataclasses.replace(asked, model=model))
    assert plan.memory.weights == load(tmp_path / "small", dtype="bfloat16").bytes


def test_what_a_tpu_will_load_is_planned_on_any_machine(tmp_path):
    path = gguf_file(tmp_path / "m.gguf", "Q8_0")
    asked = config(path, preset="none", engine={"max_len": 64})
    plan = make_plan(asked)
    assert plan.served.kv_dtype == plan.served.model.dtype == "bfloat16"
    wide = make_plan(dataclasses.replace(asked, model=ModelSection(str(path), "float32")))
    assert 1.9 < wide.memory.weights / plan.memory.weights <= 2  # norm scales are float32 in both
    for known in (str(path), "published:llama-3.1-8b"):
        halves = dataclasses.replace(asked, model=ModelSection(known, "float16"))
        with pytest.raises(ValueError, match=r"model\.dtype=float16: a TPU has none"):
            make_plan(halves)


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "shards"), [("v6e:1x1", 1), ("v5e:2x2", 4)])
def test_a_compiled_plan_agrees_with_the_shapes(tiny, topology, shards):
    # Layers' caches that a chip's vector memory doesn't hold: XLA moves smaller ones into it.
    engine = {"rows": 64, "max_len": 2048, "prefill_chunk": 64}
    asked = config(tiny, topology, mesh={"model": shards}, engine=engine)
    shapes = make_plan(asked)
    plan = make_plan(dataclasses.replace(asked, plan=PlanSection(topology=topology)))
    assert plan.fits and plan.memory.weights == shapes.memory.weights
    assert 0 <= plan.memory.other < 2**20
    assert plan.memory.total <= shapes.memory.total + 2**24  # code, and padding to tiles
    moved = plan.decode.step_bytes + plan.decode_cost.cache_bytes
    least = plan.decode_cost.weight_bytes + plan.decode_cost.cache_bytes
    assert moved <= 1.1 * least
    found = as_json(plan)["compiled_decode"]["collectives"]
    # Two a layer, the embedding's, and the sampler's maximum and first index.
    assert {kind: each["count"] for kind, each in found.items()} == (
        {"all-reduce": 2 * 2 + 1 + 2} if shards > 1 else {}
    )
    report = text(plan)
    assert "bound by cache" in report and "(compiled)" in report
    assert "<svg" in page(plan) and f"on {topology}" in page(plan)


def test_the_search_finds_the_smallest_slice_and_nothing_smaller_fits():
    asked = config("published:llama-3.1-70b", "", plan={"chips": ("v5e",), "presets": ("int8",)})
    best = search(asked)
    assert {(f.topology, f.shards) for f in best} == {("v5e:2x4", 8)}
    half = make_plan(config("published:llama-3.1-70b", "v5e:2x2", mesh={"model": 4}))
    assert not half.fits
    faster = search(dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, target=2300.0)))
    assert all(f.tokens_per_second >= 2300 and f.chips > 8 for f in faster)
    with pytest.raises(ValueError, match=r"most is .* on v5e:4x8 int8; lower plan\.target"):
        search(dataclasses.replace(asked, plan=dataclasses.replace(asked.plan, target=1e9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"plan": PlanSection(topology="v5e:2x4")},
            r"plan\.topology='v5e:2x4': a search tries",
        ),
        ({"compression": CompressionSection(rules=("embed -> keep",))}, r"compression\.rules: a"),
        ({"pool": PoolSection(ray=2)}, "a plan is of devices"),
    ],
)
def test_a_search_refuses_what_it_does_not_heed(change, message):
    with pytest.raises(ValueError, match=message):
        search(dataclasses.replace(config(topology=""), **change))


def test_spread_experts_are_planned_and_searched():
    asked = config("published:mixtral-8x7b", "v5e:2x4", mesh={"model": 8, "expert": 4})
    plan = make_plan(asked)
    assert "mesh.model=8, mesh.expert=4, 1 replica" in text(plan)
    assert as_json(plan)["mesh"] == {"model": 8, "expert": 4, "data": 1}
    assert plan.served.piece("layers.0.experts_down").shape == (2, 4096, 14336 // 2)
    with pytest.raises(ValueError, match=r"mesh.expert=16 does not divide the 8 experts"):
        make_plan(config("published:mixtral-8x7b", "v5e:4x4", mesh={"model": 16, "expert": 16}))
    with pytest.raises(ValueError, match=r"mesh.expert=2, but the model has no experts"):
        make_plan(config(topology="v5e:2x2", mesh={"model": 4, "expert": 2}))


def test_the_least_lossy_preset_that_fits_comes_first():
    asked = config(topology="", plan={"chips": ("v6e",)})
    first, *_ = search(asked)
    assert (first.topology, first.preset) == ("v6e:1x1", "none")
    plan = make_plan(config(topology="v6e:1x1", preset="none"))
    sizes = full_sizes(plan.served, asked.engine, rows=32, max_len=1024)
    assert memory_of(plan.served, sizes).total + first.spare == plan.budget
