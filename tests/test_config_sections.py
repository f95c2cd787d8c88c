"""Sections refuse what they can't mean; config files and flags fill them in."""

import dataclasses
import math

import pytest
from test_models_config import attribute_reads

from lepton_jax import cli
from lepton_jax.config import (
    EngineSection,
    HostsSection,
    JobSection,
    MeshSection,
    ModelSection,
    OptimizerSection,
    PoolSection,
    ReceiptSection,
    RunConfig,
    SamplingParams,
)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"draft_model": "m"}, "engine.draft_model='m' is of engine.speculation=draft, and that"),
        ({"draft_preset": "int8", "speculation": "lookup"}, "is 'lookup': set it, or leave"),
        ({"prefill_sizes": (96, 1024)}, "more tokens than a program may, engine.prefill_chunk=512"),
    ],
)
def test_fields_that_nothing_would_use_are_refused(engine, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(engine=EngineSection(**engine)).require_no_idle_fields()
    good = EngineSection(speculation="draft", draft_preset="int8", prefill_sizes=(96, 512))
    RunConfig(engine=good).require_no_idle_fields()


def test_fields_of_actors_need_actors():
    for name, value in {"address": "auto", "cpus": 2.0, "gpus": 1.0, "tpus": 4.0}.items():
        with pytest.raises(ValueError, match=f"pool.{name}=.* is of Ray actors, and pool.ray=0"):
            RunConfig(pool=PoolSection(**{name: value})).require_no_idle_fields()
        RunConfig(pool=PoolSection(ray=1, **{name: value})).require_no_idle_fields()


def test_the_package_exports_what_settings_in_python_need():
    import lepton_jax

    lepton_jax.RunConfig(
        engine=lepton_jax.EngineSection(rows=64),
        mesh=lepton_jax.MeshSection(model=4),
        scoring=lepton_jax.ScoringSection(labels=("a", "b")),
        cascade=lepton_jax.CascadeSection(agreement=0.99),
        sampling=lepton_jax.SamplingParams(),
    )
    assert all(hasattr(lepton_jax, name) for name in lepton_jax.__all__)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (ModelSection, {"dtype": "int4"}),
        (ModelSection, {"path": 3}),
        (ModelSection, {"chat_variables": "enable_thinking"}),
        (ModelSection, {"chat_variables": {"enable-thinking": False}}),
        (ModelSection, {"chat_variables": {"add_generation_prompt": False}}),
        (ModelSection, {"chat_variables": {"today": object()}}),
        (HostsSection, {"coordinator": "h:65535"}),
        (HostsSection, {"coordinator": "h:0"}),
        (MeshSection, {"data": 0}),
        (MeshSection, {"model": 0}),
        (EngineSection, {"rows": 0}),
        (EngineSection, {"rows": "8"}),
        (EngineSection, {"rows": 2**31}),
        (EngineSection, {"max_len": -1}),
        (EngineSection, {"prefix_cache": 1}),
        (EngineSection, {"kv_dtype": "fp8"}),
        (EngineSection, {"attention_block": 100}),
        (JobSection, {"mode": "dream"}),
        (JobSection, {"limit": -1}),
        (SamplingParams, {"max_tokens": 0}),
        (SamplingParams, {"max_tokens": 1.5}),
        (SamplingParams, {"max_tokens": True}),
        (SamplingParams, {"max_tokens": None}),
        (SamplingParams, {"min_tokens": 129}),
        (SamplingParams, {"temperature": -0.1}),
        (SamplingParams, {"temperature": math.inf}),
        (SamplingParams, {"temperature": "1"}),
        (SamplingParams, {"top_k": -1}),
        (SamplingParams, {"top_k": 2**31}),
        (SamplingParams, {"top_p": 0}),
        (SamplingParams, {"min_p": 1.01}),
        (SamplingParams, {"repetition_penalty": 0}),
        (SamplingParams, {"presence_penalty": 2.5}),
        (SamplingParams, {"frequency_penalty": math.nan}),
        (SamplingParams, {"logit_bias": {3: math.nan}}),
        (SamplingParams, {"logit_bias": {3: 1e7}}),
        (SamplingParams, {"logit_bias": {"three": 1.0}}),
        (SamplingParams, {"logit_bias": [3]}),
        (SamplingParams, {"seed": "x"}),
        (SamplingParams, {"temperature": 1e31}),
        (SamplingParams, {"repetition_penalty": 10**400}),
        (SamplingParams, {"repetition_penalty": 1e-40}),
        (SamplingParams, {"n": 257}),
        (ReceiptSection, {"prompts": 1}),
        (SamplingParams, {"stop": [""]}),
        (SamplingParams, {"stop": 3}),
        (SamplingParams, {"stop_token_ids": [1.0]}),
        (SamplingParams, {"stop_token_ids": 5}),
        (SamplingParams, {"ignore_eos": "no"}),
        (SamplingParams, {"logprobs": 21}),
    ],
)
def test_a_value_that_is_not_allowed_is_named(section, values):
    (name,) = values
    flags = {SamplingParams: "sampling"}.get(section, section.__name__.lower()[: -len("section")])
    with pytest.raises(ValueError, match=rf"^{flags}\.{name}=.* is not allowed: want "):
        section(**values)


def test_values_in_the_forms_that_json_and_python_give():
    params = SamplingParams(stop="END", stop_token_ids=[3], logit_bias={"7": 2}, temperature=1)
    assert params.stop == ("END",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == {7: 2.0}


def test_every_field_is_read():
    reads = attribute_reads(skip=("config.py", "config_"))
    for section in dataclasses.fields(RunConfig):
        kind = type(getattr(RunConfig(), section.name))
        fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
        unread = [field.name for field in fields if field.name not in reads]
        assert not unread, f"{section.name} has fields that nothing reads: {unread}"


def test_every_field_is_documented():
    described = cli.describe_fields()
    assert "('yes','no')" in described
    for section in dataclasses.fields(RunConfig):
        if section.metadata:
            assert f"--config.{section.name} (" in described
            continue
        for field in dataclasses.fields(section.default_factory):
            assert field.metadata["doc"]
            assert f"--config.{section.name}.{field.name} (" in described


def test_overrides_are_filled_up_with_the_defaults():
    overrides = {
        "engine": {"rows": 8},
        "sampling": {"temperature": 1, "stop": "END", "logit_bias": {5: -1.0}, "seed": 0},
    }
    config = cli.run_config(cli.whole_config(overrides))
    sampling = SamplingParams(temperature=1.0, stop=("END",), logit_bias={5: -1.0}, seed=0)
    assert config == RunConfig(engine=EngineSection(rows=8), sampling=sampling)
    assert cli.run_config(cli.whole_config({})) == RunConfig()


@pytest.mark.parametrize(
    ("field", "in_file", "flag", "meant"),
    [
        ("logprobs", 3, "none", None),
        ("logprobs", 3, None, None),
        ("logprobs", None, 2, 2),
        ("seed", 7, "None", None),
        ("json_schema", {"type": "object"}, "none", {}),
        ("json_schema", {}, '{"additionalProperties": false}', {"additionalProperties": False}),
        ("logit_bias", {3: 1.0}, '{"5": -1}', {5: -1.0}),
        ("logit_bias", {3: 1.0}, {5: -1}, {5: -1.0}),
    ],
)
def test_fields_that_may_be_none_take_it_from_the_command_line(field, in_file, flag, meant):
    config = cli.whole_config({"sampling": {field: in_file}})
    config.sampling[field] = flag  # as a flag sets it: a text where it is no literal of Python
    assert getattr(cli.run_config(config).sampling, field) == meant


@pytest.mark.parametrize("flag", ['{"think": false, "a": [1]}', {"think": False, "a": (1,)}])
def test_variables_of_chats_come_from_the_file_or_the_command_line(flag):
    config = cli.whole_config({"model": {"chat_variables": {"think": True, "b": {"c": None}}}})
    assert cli.run_config(config).model.chat_variables == {"think": True, "b": {"c": None}}
    config.model.chat_variables = flag
    assert cli.run_config(config).model.chat_variables == {"think": False, "a": [1]}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"engin": {}}, "'engin'; did you mean 'engine'"),
        ({"engine": {"row": 1}}, "config.engine: unknown field 'row'; did you mean 'rows'"),
        ({"engine": 3}, "config.engine is 3: want a dict"),
        ({"engine": {"rows": "many"}}, "config.engine.rows='many' is not allowed: want int"),
        ({"sampling": {"seed": "x"}}, "seed='x' is not allowed: want a whole number or none"),
        (None, "get_config returned None: want a dict"),
    ],
)
def test_overrides_that_fit_no_field_are_named(overrides, says):
    with pytest.raises(ValueError, match=says):
        cli.run_config(cli.whole_config(overrides))


def test_drivers_of_one_engine_refuse_more():
    RunConfig().require_one_engine("bench")
    for several in (
        RunConfig(mesh=MeshSection(data=2)),
        RunConfig(pool=PoolSection(ray=1)),
        RunConfig(hosts=HostsSection("h:1")),
    ):
        with pytest.raises(ValueError, match="bench works with one engine on one host"):
            several.require_one_engine("bench")


def test_a_driver_without_feedback_refuses_what_is_asked_of_it():
    RunConfig(optimizer=OptimizerSection(profile="off", feedback="off")).require_no_feedback("x")
    for asked in (dict(log="decisions"), dict(profile="file.json"), dict(feedback="on")):
        config = RunConfig(optimizer=OptimizerSection(**asked))
        with pytest.raises(ValueError, match="bench runs the config as it is, without feedback"):
            config.require_no_feedback("bench")
