"""Profiles: kept, found, and refused with the reason; workload classes; the space of a search."""

import dataclasses
import json
import shlex

import pytest
from absl import flags
from ml_collections import config_flags

from lepton_jax import cli
from lepton_jax.config import CompressionSection, RunConfig, SamplingParams
from lepton_jax.engine.scored import Scoring
from lepton_jax.optimizer import profile as profiles
from lepton_jax.optimizer.costs import UNIT
from lepton_jax.optimizer.profile import Key, Profile, find, has_any, others
from lepton_jax.optimizer.sample import SampledRequest, require_rows, workload_class
from lepton_jax.optimizer.space import MESH, PRECISION, Candidate, axes, space, with_fields

CONFIG = RunConfig()


def key(**changes) -> Key:
    made = Key.here("abc", CONFIG, given=(), workload="new64-prompt64-rows256")
    return dataclasses.replace(made, **changes)


def profile(**changes) -> Profile:
    fields = {"engine.rows": 64, "compression.preset": "int8"}
    return Profile(key(**changes), fields, UNIT, {"decode_block": 3}, {"effect": 1.5})


def test_a_profile_comes_back_as_it_was(tmp_path):
    made = profile()
    made.save(tmp_path / "deep" / "p.json")
    assert Profile.read(tmp_path / "deep" / "p.json") == made
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.json"]


def test_a_profile_is_of_one_dtype_and_processor(monkeypatch):
    made = key()
    wide = with_fields(CONFIG, {"model.dtype": "float32"})
    other = Key.here("abc", wide, given=(), workload=made.workload)
    assert made.differences(other) == ["another model.dtype ('float32', here 'auto')"]
    monkeypatch.setattr(profiles, "processor_name", lambda: "another processor")
    assert "another device (" in made.differences(key())[0]


def test_fields_that_were_given_stay():
    applied = profile().applied(CONFIG, given=["engine.rows"])
    assert (applied.engine.rows, applied.compression.preset) == (CONFIG.engine.rows, "int8")
    assert profile().applied(CONFIG, given=()).engine.rows == 64


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (
            "engine.rows",
            {
                "engine.prefill_sizes",
                "engine.prefill_chunk",
                "engine.speculation",
                "engine.draft_preset",
            },
        ),
        ("engine.prefill_chunk", {"engine.speculation", "engine.draft_preset"}),
        ("engine.prefill_sizes", {"engine.speculation", "engine.draft_preset"}),
        ("engine.speculation", {"engine.prefill_sizes", "engine.prefill_chunk"}),
    ],
)
def test_fields_go_with_those_that_they_were_chosen_for(given, left):
    fields = {"engine.speculation": "draft", "engine.draft_preset": "int8"}
    fields |= {"engine.prefill_sizes": (96, 200), "engine.prefill_chunk": 256}
    made = dataclasses.replace(profile(), fields=fields)
    assert set(made.open_fields([given])) == left


def test_the_profile_of_a_key_is_found_and_others_are_named(tmp_path):
    assert not has_any(key(), tmp_path) and find(key(), tmp_path)[0] is None
    other = profile(workload="score-prompt256-rows64")
    for made in (profile(), other, profile(model="another")):
        made.save(tmp_path / made.key.file_name)
    assert find(key(), tmp_path)[0] == profile()
    assert has_any(key(workload="?"), tmp_path)
    found, why = find(key(workload="new4-prompt4-rows4"), tmp_path)
    assert found is None
    assert "there are some for new64-prompt64-rows256, score-prompt256-rows64" in why
    assert not has_any(key(jax="0.1"), tmp_path)
    (said,) = others(key(jax="0.1"), tmp_path)
    assert "is of another version of jax (" in said and "here '0.1')" in said
    assert not others(key(model="a third"), tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (dict(model="other"), "another model ('other', here 'abc')"),
        (dict(device="TPU v9"), "another device ('TPU v9', here"),
        (dict(jax="0.0.1"), "another version of jax ('0.0.1', here"),
        (dict(mesh="1x8"), "another mesh ('1x8', here 'free, of 8')"),
        (dict(workload="score"), "another kind of workload ('score', here 'new64"),
        (dict(compression="int4"), "another compression ('int4', here 'free')"),
        (dict(objective="latency"), "another objective ('latency', here 'throughput')"),
    ],
)
def test_a_profile_of_something_else_is_refused_with_the_reason(tmp_path, changes, why):
    profile(**changes).save(tmp_path / "p.json")
    with pytest.raises(ValueError, match="tune again here, or set optimizer.profile=off") as error:
        find(key(), tmp_path, str(tmp_path / "p.json"))
    assert why in str(error.value) and "p.json" in str(error.value)


def test_compression_that_was_asked_for_is_part_of_the_key():
    config = dataclasses.replace(CONFIG, compression=CompressionSection(preset="int8"))
    asked = Key.here("abc", config, given=["compression.preset"], workload="w")
    free = Key.here("abc", config, given=[], workload="w")
    assert (asked.compression, free.compression) == ('["int8"]', "free")


def test_a_mesh_that_was_asked_for_is_part_of_the_key():
    config = with_fields(CONFIG, {"mesh.model": 2})
    asked = Key.here("abc", config, given=["mesh.model"], workload="w")
    free = Key.here("abc", config, given=[], workload="w")
    assert (asked.mesh, free.mesh) == ("1x2", "free, of 8")


def damaged(text: str, **changes) -> str:
    return json.dumps(json.loads(text) | changes)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: damaged(text, format=99),
        lambda text: damaged(text, key={"model": "x"}),
        lambda text: damaged(text, fields={"engine.rowz": 3}),
        lambda text: damaged(text, costs={"block": 1}),
        lambda text: damaged(text, knobs={"decode_blok": 1}),
    ],
)
def test_a_damaged_profile_is_a_clear_error(tmp_path, damage):
    path = tmp_path / key().file_name
    profile().save(path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match="is no profile of this version .*delete it and tune"):
        find(key(), tmp_path)
    assert not has_any(key(), tmp_path)
    (tmp_path / "kl-abc.json").write_text("{}")
    (said,) = others(key(), tmp_path)
    assert said.startswith(f"{path} is no profile of this version")
    assert said in find(key(workload="w"), tmp_path)[1]


def test_what_another_goal_found_is_another_profile():
    latency = Key.here(
        "abc", with_fields(CONFIG, {"optimizer.objective": "latency"}), given=(), workload="w"
    )
    assert latency.file_name != dataclasses.replace(latency, objective="throughput").file_name


def requests(count, prompt, new, **fields) -> list[SampledRequest]:
    params = SamplingParams(max_tokens=new)
    return [SampledRequest((n, *range(prompt - 1)), params) for n in range(count)]


def test_workload_classes():
    assert workload_class(requests(100, 50, 30)) == "new64-prompt64-rows256"
    assert workload_class(requests(90, 60, 64)) == "new64-prompt64-rows256"
    assert workload_class([*requests(20, 50, 30), *requests(2, 50, 900)]).endswith("-tailed")
    shared = [SampledRequest((*range(40), n), SamplingParams(max_tokens=4)) for n in range(9)]
    assert workload_class(shared) == "new4-prompt64-rows16-shared"
    scored = [SampledRequest((1, 2, n), Scoring(targets=((1,),))) for n in range(3)]
    assert workload_class(scored) == "score-prompt4-rows4"


def test_an_empty_sample_is_refused():
    for refuse in (require_rows, workload_class):
        with pytest.raises(ValueError, match="the workload's sample is empty"):
            refuse([])


def test_the_space_begins_with_the_config_and_leaves_given_fields_alone():
    choices = {("engine.rows",): [(4,), (32,), (64,)], ("engine.decode_block",): [(8,), (16,)]}
    choices[PRECISION] = [("none", "auto"), ("int8", "auto"), ("int8", "int8")]
    found = space(CONFIG, choices, given=())
    assert found[0].applied(CONFIG) == CONFIG
    assert len(found) == len(set(found)) == 3 * 2 * 3
    assert found[-1].text() == "preset=int8 decode_block=16 kv_dtype=int8 rows=64"
    fixed = space(CONFIG, choices, given=["engine.rows", "compression.preset"])
    assert {c.applied(CONFIG).engine.rows for c in fixed} == {32}
    assert {c.applied(CONFIG).compression.preset for c in fixed} == {"none"}
    assert len(fixed) == 2


def test_flags_of_a_candidate_are_what_a_driver_takes():
    fields = {"engine.rows": 64, "engine.draft_cost": 0.25, "compression.preset": "w8a8"}
    for sizes, text in [((96, 200), "=96,200"), ((96,), "=96"), ((), "=()'")]:
        candidate = Candidate.of(fields | {"engine.prefill_sizes": sizes})
        assert f"--config.engine.prefill_sizes{text} " in candidate.flags()
        argv, values = ["run", *shlex.split(candidate.flags())], flags.FlagValues()
        options = dict(flag_values=values, sys_argv=argv)
        config_flags.DEFINE_config_dict("config", cli.whole_config({}), **options)
        values(argv)
        assert cli.run_config(values["config"].value) == candidate.applied(CONFIG)


def test_what_varies_is_bounded_by_requests_and_devices():
    found = axes(requests=20, precisions=[], devices=4, shared=True)
    assert max(found["engine.rows",]) == (32,)  # 64 are more than twice the requests
    assert found[MESH] == [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
    assert found["engine.page_size",] and found[PRECISION] == []
    alone = axes(requests=20, precisions=[], devices=1, shared=False)
    assert alone[MESH] == [(1, 1)] and ("engine.page_size",) not in alone


def test_a_value_that_is_not_allowed_is_refused():
    with pytest.raises(ValueError, match="rows=0 is not allowed"):
        Candidate.of({"engine.rows": 0}).applied(CONFIG)
    assert with_fields(CONFIG, {}) == CONFIG
