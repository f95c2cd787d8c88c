"""A search on a tiny model, on this machine's device; the driver; the profile that a run takes."""

import dataclasses
import json
import math
import re
import runpy
from pathlib import Path

import pytest
from compress_makers import model_folder

from lepton_jax import LeptonOptimizer, cli, tune
from lepton_jax.config import (
    CascadeSection,
    EngineSection,
    JobSection,
    ModelSection,
    RunConfig,
    SamplingParams,
)
from lepton_jax.jobs import tuning
from lepton_jax.optimizer import lepton_optimizer, refine
from lepton_jax.optimizer import profile as profiles
from lepton_jax.optimizer import search as searching
from lepton_jax.optimizer.accuracy import Accuracy
from lepton_jax.optimizer.costs import UNIT
from lepton_jax.optimizer.found import Found, Tried
from lepton_jax.optimizer.profile import Profile
from lepton_jax.optimizer.search import Search
from lepton_jax.optimizer.space import MESH, Candidate, with_fields
from lepton_jax.optimizer.trial import Trial

PROMPTS = [f"{word} of number {n}" for n, word in enumerate(["a row", "another row"] * 6)]
GIVEN = (
    "engine.prefill_chunk", "engine.decode_block", "mesh.data", "mesh.model",
    "engine.prefill_sizes", "engine.speculation",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("tuned") / "model", layers=1)


@pytest.fixture(scope="module")
def config(model, tmp_path_factory):
    rows = tmp_path_factory.mktemp("rows") / "in.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return RunConfig(
        model=ModelSection(path=str(model)),
        engine=EngineSection(rows=2, page_size=16, prefill_chunk=64, decode_block=4),
        sampling=SamplingParams(max_tokens=6, ignore_eos=True),
        job=JobSection(input=str(rows), output=str(rows.parent / "out.jsonl")),
    )


def goal(config, **fields) -> RunConfig:
    return with_fields(config, {f"optimizer.{name}": value for name, value in fields.items()})


@pytest.fixture(scope="module")
def searched(config, tmp_path_factory):
    """(config, optimizer, profile, stages) of one search."""
    directory, stages = tmp_path_factory.mktemp("profiles"), []
    config = goal(config, trials=2, repeats=1)
    optimizer = LeptonOptimizer(directory=directory)
    profile = optimizer.search(
        config, PROMPTS, given=GIVEN, progress=lambda stage, *_: stages.append(stage)
    )
    return config, optimizer, profile, stages


def test_the_winner_is_the_fastest_of_what_was_tried(searched):
    config, optimizer, profile, stages = searched
    found = optimizer.found
    assert found.tried[0].candidate.applied(config) == config
    assert found.best.trial.seconds == min(one.trial.seconds for one in found.tried)
    assert found.effect == found.tried[0].trial.seconds / found.best.trial.seconds
    assert profile.numbers["effect"] == found.effect >= 1
    assert found.considered == len((2, 4, 8, 16)) and not found.too_large
    for one in found.tried:
        assert one.trial.lengths == [6] * len(PROMPTS)
        assert 0 < one.trial.first_token <= one.trial.whole <= one.trial.seconds
        assert one.trial.compile_seconds > 0 and one.trial.programs > 1
        assert one.predicted > 0 and one.error == one.predicted / one.trial.seconds - 1
    assert {"load none", "predict", "try"} == set(stages) - {"turns"}


def test_the_profile_lies_where_it_says_and_leaves_given_fields_alone(searched):
    config, optimizer, profile, _ = searched
    assert Profile.read(optimizer.path_of(profile)) == profile
    applied = profile.applied(config, given=GIVEN)
    assert applied.engine.prefill_chunk == 64 and applied.engine.decode_block == 4
    assert profile.key.workload == "new16-prompt64-rows16"


def test_the_table_names_every_trial_and_the_effect(searched):
    _, optimizer, _, _ = searched
    text = tuning.table(optimizer.found)
    assert text.count("<- best") == 1 and "effect T1/T0 = " in text
    tried, best = optimizer.found.tried, optimizer.found.best
    assert text.count(" rows=") == len(tried)
    assert "KL from the uncompressed model at most 0.0000" in text
    programs = sum(one.trial.programs for one in tried)
    assert f"{len(tried)} tried, {programs} programs compiled in " in text
    flags = f"--config.engine.rows={dict(best.candidate.fields)['engine.rows']}"
    assert flags in text.splitlines()[-1]
    for one in tried:
        assert f"{one.trial.whole:6.2f}s {one.score:7.2f}s  {one.candidate.text()}" in text


def test_the_profile_has_all_that_was_tried(searched):
    _, optimizer, profile, _ = searched
    tried = optimizer.found.tried
    assert [told["fields"] for told in profile.tried] == [dict(t.candidate.fields) for t in tried]
    for told, one in zip(profile.tried, tried, strict=True):
        assert (told["predicted"], told["score"]) == (one.predicted, one.score)
        for name in ("seconds", "first_token", "whole"):
            assert told[name] == getattr(one.trial, name)


def test_a_later_optimizer_finds_the_profile(searched, caplog):
    config, optimizer, profile, _ = searched
    later = LeptonOptimizer(directory=optimizer.path_of(profile).parent)
    assert later.find(config, PROMPTS, given=GIVEN) == profile
    assert later.find(goal(config, profile="off"), PROMPTS, given=GIVEN) is None
    assert "profile:" not in caplog.text
    longer = with_fields(config, {"sampling.max_tokens": 90})
    assert later.find(longer, PROMPTS, given=GIVEN) is None
    assert "profile: none for workload new256-prompt64-rows16" in caplog.text
    named = goal(longer, profile=str(optimizer.path_of(profile)))
    with pytest.raises(ValueError, match="another kind of workload"):
        later.find(named, PROMPTS, given=GIVEN)
    quick = LeptonOptimizer(directory=optimizer.path_of(profile).parent, objective="latency")
    assert quick.find(config, PROMPTS, given=GIVEN) is None


def test_a_run_takes_the_profile_and_says_so(searched, monkeypatch):
    config, optimizer, profile, _ = searched
    directory = optimizer.path_of(profile).parent
    monkeypatch.setattr(profiles, "default_directory", lambda: directory)
    applied, taken, said = tuning.with_profile(config, GIVEN)
    assert taken == profile and applied.engine == profile.applied(config, GIVEN).engine
    assert applied.optimizer.profile == str(optimizer.path_of(profile)) in said
    assert "times as fast on new16-prompt64-rows16 on this device, KL at most 0.0000" in said
    asked = dict(config=applied, decisions=3)
    told = tuning.account(profile, GIVEN, **asked)
    assert told["profile"] == applied.optimizer.profile and told["decisions"] == 3
    assert set(told["fields"]) == set(profile.fields) - set(GIVEN)
    assert (told["effect"], told["kl"]) == (optimizer.found.effect, 0.0)
    assert tuning.account(None, GIVEN, **asked)["profile"] is None
    given = [*GIVEN, "engine.rows"]
    applied, _, said = tuning.with_profile(config, given)
    assert applied.engine.rows == 2 and "engine.rows, mesh.data, mesh.model as given" in said
    assert tuning.with_profile(goal(config, profile="off"), GIVEN)[1:] == (None, "")
    longer = with_fields(config, {"sampling.max_tokens": 90})
    unchanged, taken, said = tuning.with_profile(longer, GIVEN)
    assert (unchanged.engine, taken) == (longer.engine, None)
    assert "none for workload new256-prompt64-rows16" in said
    named = goal(longer, profile=str(optimizer.path_of(profile)))
    with pytest.raises(ValueError, match="another kind of workload"):
        tuning.with_profile(named, GIVEN)


def test_a_run_says_that_its_compression_has_no_profile(searched, monkeypatch):
    config, optimizer, profile, _ = searched
    directory = optimizer.path_of(profile).parent
    monkeypatch.setattr(profiles, "default_directory", lambda: directory)
    int8 = with_fields(config, {"compression.preset": "int8"})
    applied, taken, said = tuning.with_profile(int8, [*GIVEN, "compression.preset"])
    assert (applied.engine, taken) == (config.engine, None)
    assert said.startswith(f"profile: none here; {optimizer.path_of(profile)} is of another comp")
    assert """('free', here '["int8"]') (free: for runs that give neither""" in said


@pytest.fixture
def elsewhere(searched, tmp_path, monkeypatch):
    """A profile's file in a directory of its own, where runs look."""
    _, optimizer, profile, _ = searched
    monkeypatch.setattr(profiles, "default_directory", lambda: tmp_path)
    (tmp_path / "kl-abc.json").write_text("{}")
    path = tmp_path / profile.key.file_name
    path.write_bytes(optimizer.path_of(profile).read_bytes())
    return path


def test_a_run_names_a_profile_of_another_version_or_goal(searched, elsewhere):
    config, _, profile, _ = searched
    older = dataclasses.replace(profile, key=dataclasses.replace(profile.key, jax="0.0.1"))
    older.save(elsewhere)
    applied, taken, said = tuning.with_profile(config, GIVEN)
    assert (applied.engine, taken) == (config.engine, None)
    assert said.startswith(f"profile: none here; {elsewhere} is of another version of jax ('0.0.1'")
    profile.save(elsewhere)
    assert tuning.with_profile(config, GIVEN)[1] == profile
    said = tuning.with_profile(goal(config, objective="latency"), GIVEN)[2]
    assert "is of another objective ('throughput', here 'latency')" in said


def test_a_run_names_a_damaged_profile(searched, elsewhere):
    config = searched[0]
    elsewhere.write_text(elsewhere.read_text()[:100])
    taken, said = tuning.with_profile(config, GIVEN)[1:]
    assert taken is None and said.startswith(f"profile: none here; {elsewhere} is no profile of")
    assert "kl-abc" not in said


@pytest.fixture
def found_at_once(monkeypatch):
    """Searches find the config as it is."""

    def run(search) -> Found:
        values = {"compression.preset": "compression", "engine.kv_dtype": "engine"}
        fields = {
            n: getattr(getattr(search._config, s), n.split(".")[1]) for n, s in values.items()
        }
        trial = Trial(1.0, 0.1, 0.5, (), 0.0, 0, (), {})
        best = Tried(Candidate.of(fields), 1.0, trial, UNIT, 1.0, True)
        return Found(best, (best,), 1, 0, {}, {}, None, "throughput")

    monkeypatch.setattr(lepton_optimizer.Search, "run", run)


def test_compression_without_a_bound_is_only_for_runs_that_ask_for_it(
    config, found_at_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(profiles, "default_directory", lambda: tmp_path)
    compressed = with_fields(config, {"compression.preset": "w8a8", "engine.kv_dtype": "bfloat16"})
    profile = LeptonOptimizer(directory=tmp_path).search(compressed, config_requests(config))
    assert profile.key.compression == '["w8a8"], cache bfloat16' and not profile.fields
    dense, taken, said = tuning.with_profile(config, ())
    assert (dense.compression, dense.engine, taken) == (config.compression, config.engine, None)
    assert """is of another compression ('["w8a8"], cache bfloat16', here 'free')""" in said
    assert tuning.with_profile(compressed, ["compression.preset"])[1] is None
    both = ["compression.preset", "engine.kv_dtype"]
    assert tuning.with_profile(compressed, both)[1] == profile
    bounded = LeptonOptimizer(directory=tmp_path, max_kl=0.1)
    free = bounded.search(compressed, config_requests(config))
    assert free.key.compression == "free" and free.fields["compression.preset"] == "w8a8"


def config_requests(config):
    return tuning.sample_requests(config, tuning.load_tokenizer(config))


def test_the_documented_pair_of_commands_makes_a_profile_and_takes_it(
    config, found_at_once, tmp_path, monkeypatch
):
    monkeypatch.setattr(profiles, "default_directory", lambda: tmp_path)
    file = Path(__file__).parent.parent / "configs" / "tune.py"
    named = runpy.run_path(str(file))["get_config"]()
    given = [f"{section}.{field}" for section in named for field in named[section]]
    shipped = cli.run_config(cli.whole_config(named))
    asked = dataclasses.replace(shipped, model=config.model, job=config.job)
    for page in (file, file.parent.parent / "README.md", Path(tune.__file__)):
        commands = re.findall(
            r"python -m lepton_jax\.(\w+) --config=configs/(tune\.py)", page.read_text()
        )
        assert [name for name, _ in commands] == ["tune", "run"], page
    requests = config_requests(asked)
    optimizer = LeptonOptimizer.of(asked)
    optimizer._directory = tmp_path
    profile = optimizer.search(asked, requests, given=given)
    assert tuning.with_profile(asked, given)[1] == profile


def test_tune_refuses_what_only_a_run_does(config, capsys):
    for fields in (dict(log="decisions"), dict(profile="a.json")):
        with pytest.raises(SystemExit, match="2"):
            tune.main(goal(config, **fields))
        assert "leave out optimizer.profile and optimizer.log" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tune.main(dataclasses.replace(config, cascade=CascadeSection(agreement=0.9)))
    assert "tune works with one model: leave out cascade.agreement" in capsys.readouterr().err


def test_without_profiles_nothing_is_read(config, tmp_path, monkeypatch):
    monkeypatch.setattr(profiles, "default_directory", lambda: tmp_path / "none")
    gone = with_fields(config, {"model.path": "/gone"})
    assert tuning.with_profile(gone, ()) == (goal(gone, profile="off"), None, "")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(max_ttft=1e-6), "isn't met by what was tried: the nearest is"),
        (dict(memory=1000), "nothing fits into optimizer.memory=1000 bytes: the smallest"),
    ],
)
def test_a_goal_that_cannot_be_met_names_the_nearest(config, tmp_path, fields, says):
    config = goal(config, trials=1, repeats=1)
    optimizer = LeptonOptimizer(directory=tmp_path, **fields)
    with pytest.raises(ValueError, match=says):
        optimizer.search(config, PROMPTS, given=[*GIVEN, "engine.rows"])
    assert not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_precisions_are_tried_as_far_as_they_keep_the_accuracy(config, tmp_path):
    config = goal(config, trials=2, repeats=1)
    given = [*GIVEN, "engine.rows", "engine.kv_dtype"]
    LeptonOptimizer(directory=tmp_path).search(config, PROMPTS, given=given)
    assert not list(tmp_path.glob("kl-*.json"))
    strict = LeptonOptimizer(directory=tmp_path, max_kl=1e-9)
    strict.search(config, PROMPTS, given=given)
    (file,) = tmp_path.glob("kl-*.json")
    kls = json.loads(file.read_text())
    assert kls["int4"] > kls["int8"] > kls["none"] == 0
    assert strict.found.too_coarse == {name: kl for name, kl in kls.items() if kl}
    assert set(strict.found.too_coarse) == {"int8_g32", "int8", "w8a8", "int4"}
    assert len(strict.found.tried) == 1 and strict.found.kl == 0
    stages = []
    easy = LeptonOptimizer(directory=tmp_path, max_kl=9.0)
    easy.search(config, PROMPTS, given=given, progress=lambda stage, *_: stages.append(stage))
    assert "accuracy" not in stages  # it is known
    other = easy.found.tried[1].candidate.applied(config).compression.preset
    assert other != "none" and not easy.found.too_coarse
    coarse = with_fields(config, {"compression.preset": "int4"})
    with pytest.raises(ValueError, match="'int4' diverges by .* more than optimizer.max_kl=1e-09"):
        strict.search(coarse, PROMPTS, given=GIVEN)
    cached = with_fields(config, {"engine.kv_dtype": "int8"})
    with pytest.raises(ValueError, match="'none' with engine.kv_dtype='int8' diverges by"):
        strict.search(cached, PROMPTS, given=GIVEN)


def test_accuracy_is_measured_on_one_device(config, tmp_path, monkeypatch):
    shared = with_fields(config, {"compression.preset": "int8", "mesh.model": 2})
    strict = LeptonOptimizer(directory=tmp_path, max_kl=1e-9)
    with pytest.raises(ValueError, match="'int8' diverges by .* more than optimizer.max_kl=1e-09"):
        strict.search(shared, PROMPTS, given=GIVEN)
    monkeypatch.setattr(searching, "_device_memory", lambda: 1000)
    with pytest.raises(
        ValueError, match="max_kl is measured on one device.*bytes of its 1000: lea"
    ):
        strict.search(shared, PROMPTS, given=GIVEN)


def test_meshes_are_tried_on_their_devices(config):
    asked = goal(config, trials=3, repeats=1, objective="cost")
    tokenizer = tuning.load_tokenizer(config)
    requests = tuning.sample_requests(asked, tokenizer)
    choices = {MESH: [(2, 1), (1, 2)]}
    free = set(GIVEN) - set(MESH)
    accuracy = Accuracy(tokenizer, Path("none"), "none")
    found = Search(
        asked, requests, tokenizer, accuracy=accuracy, given=free, choices=choices, margin=math.inf
    ).run()
    seen = {(c.mesh.data, c.mesh.model) for c in (t.candidate.applied(asked) for t in found.tried)}
    assert seen == {(1, 1), (2, 1), (1, 2)} and found.considered == 3
    for one in found.tried:
        assert one.trial.outputs == found.tried[0].trial.outputs
        devices = math.prod(dict(one.candidate.fields)[name] for name in MESH)
        assert one.score == one.trial.seconds * devices
        assert sum(beat.tokens for beat in one.trial.beats) >= 6 * len(PROMPTS)


@pytest.mark.slow
def test_speculation_and_prefill_sizes_are_tried_where_they_promise_something(
    config, tmp_path, monkeypatch
):
    # What a step of so small a model costs by its places is chance.
    monkeypatch.setattr(refine, "gain", lambda *_, **__: 2.0)
    always = {"sampling.max_tokens": 40, "sampling.logit_bias": {65: 1e3}}
    config = with_fields(goal(config, trials=1, repeats=1), always)
    given = [*set(GIVEN) - {"engine.speculation", "engine.prefill_sizes"}, "engine.rows"]
    optimizer = LeptonOptimizer(directory=tmp_path)
    profile = optimizer.search(config, PROMPTS, given=given)
    plain, *more = optimizer.found.tried
    lookup = next(t for t in more if dict(t.candidate.fields).get("engine.speculation") == "lookup")
    assert lookup.trial.outputs == plain.trial.outputs
    assert sum(b.steps for b in lookup.trial.beats) < sum(b.steps for b in plain.trial.beats)
    assert dict(lookup.candidate.fields)["engine.draft_cost"] > 0
    assert Profile.read(optimizer.path_of(profile)) == profile
    optimizer.search(config, PROMPTS, given=[*given, "engine.speculation", "engine.prefill_sizes"])
    assert len(optimizer.found.tried) == 1


def test_an_empty_workload_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="the workload's sample is empty"):
        LeptonOptimizer(directory=tmp_path).search(config, [])


def test_rows_are_sampled_as_their_mode_makes_requests(config, tmp_path):
    tokenizer = tuning.load_tokenizer(config)
    sampled = tuning.sample_requests(goal(config, sample=5), tokenizer)
    assert [bytes(r.prompt_ids[:1]) != b"" for r in sampled] == [True] * 5
    rows = tmp_path / "score.jsonl"
    pairs = [{"context": "a", "continuation": "bc"}, {"bad": 1}, {"context": "ab", "choices": "cd"}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    job = dataclasses.replace(config.job, input=str(rows), mode="score")
    (scored,) = tuning.sample_requests(dataclasses.replace(config, job=job), tokenizer)
    assert bytes(scored.prompt_ids) == b"ab" and scored.limit == 0
    assert scored.asked.targets == ((ord("b"),), (ord("c"),))


def test_a_table_is_sampled_as_a_job_reads_it(config, tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text('prompt_tokens,prompt,note\n"[97, 98]",,x\n,ab,y\n')
    job = dataclasses.replace(config.job, input=str(rows), keep="note,asked=prompt")
    cascade = CascadeSection(agreement=0.9, audit=0.5)
    asked = dataclasses.replace(config, job=job, cascade=cascade)
    sampled = tuning.sample_requests(asked, tuning.load_tokenizer(config))
    assert [bytes(request.prompt_ids) for request in sampled] == [b"ab", b"ab"]


def test_rows_that_the_engine_will_refuse_are_no_sample(config, tmp_path, caplog):
    tokenizer = tuning.load_tokenizer(config)
    rows = tmp_path / "rows.jsonl"
    asked = [
        {"id": "good", "prompt": "abc"},
        {"id": "long", "prompt": "a" * 40},
        {"id": "odd", "prompt_tokens": [1, 9999]},
        {"id": "two", "prompt": "ab", "sampling": {"n": 2}},
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    job = dataclasses.replace(config.job, input=str(rows))
    short = with_fields(dataclasses.replace(config, job=job), {"engine.max_len": 32})
    sampled = tuning.sample_requests(short, tokenizer)
    assert [bytes(r.prompt_ids) for r in sampled] == [b"abc", b"ab", b"ab"]
    assert "sampled without 2 rows that become error rows: 'long': the prompt has 40" in caplog.text
    few_pages = with_fields(short, {"engine.num_pages": 2, "engine.max_len": 64})
    assert len(tuning.sample_requests(few_pages, tokenizer)) == 3
