"""lm_eval's tasks on SmolLM2: the numbers of its Hugging Face backend.

`fixtures/evaluation/smollm2.json` was written by `scripts/make_evaluation_fixtures.py`.
"""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import pytest
from jobs_fakes import ByteTokenizer, FakeEngine
from lm_eval import simple_evaluate
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from lepton_jax import evaluation
from lepton_jax.evaluation import LeptonLM, _sampling

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "evaluation"
TASKS = ["lepton_choices", "lepton_perplexity", "lepton_answers"]
LOGPROB_ERROR = 1e-3


def test_the_model_is_known_by_name_and_as_an_entry_point():
    assert get_model("lepton_jax") is LeptonLM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["lm_eval.models"]["lepton_jax"]
    assert EntryPoint("lepton_jax", target, "lm_eval.models").load() is LeptonLM


def test_generation_kwargs_become_sampling_fields():
    params = _sampling({"until": ["\n", "Q:"], "max_gen_toks": 9, "do_sample": False})
    assert (params.stop, params.max_tokens, params.temperature) == (("\n", "Q:"), 9, 0.0)
    assert _sampling({"until": "x", "temperature": 0.0}).stop == ("x",)
    assert _sampling({}).max_tokens == 256
    drawn = _sampling({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_tokens": 5})
    assert (drawn.temperature, drawn.top_p, drawn.max_tokens) == (0.7, 0.9, 5)
    assert _sampling({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    with pytest.raises(ValueError, match="unknown field 'num_beams'"):
        _sampling({"num_beams": 4})


def test_other_arguments_are_refused():
    with pytest.raises(ValueError, match="unknown field 'batchsize'"):
        LeptonLM("nowhere", batchsize=3)

    with pytest.raises(ValueError, match="unknown field 'max_batch_size'"):
        LeptonLM("nowhere", batch_size=1, device="cuda:0", max_batch_size=3)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("engin.rows", 4, "section: unknown field 'engin'; did you mean 'engine'?"),
        ("engine.row", 4, "engine: unknown field 'row'; did you mean 'rows'?"),
        ("job.input", "x", "section: unknown field 'job'"),
        ("engine.page_size", "many", "page_size='many' is not allowed: want a whole number"),
        ("engine.rows", None, "rows='none' is not allowed"),
    ],
)
def test_settings_that_are_none_are_refused(name, value, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        LeptonLM("nowhere", **{name: value})


class FakeLepton:
    """Loads nothing and asks a `FakeEngine`."""

    tokenizer = ByteTokenizer()

    def __init__(self, engine):
        self.engine = engine

    def load_model(self, config):
        self.config = config
        return self

    def start(self):
        return self


def asked(*requests):
    return [SimpleNamespace(args=(text, {"max_gen_toks": 4} | more)) for text, more in requests]


def test_any_field_of_the_engine_and_the_model_can_be_set(monkeypatch):
    monkeypatch.setattr(evaluation, "LeptonEngine", lambda: FakeLepton(FakeEngine()))
    given = "path=m,compression=none,rows=4,mesh.model=2,engine.kv_dtype=int8,model.tokenizer=other"
    lm = LeptonLM.create_from_arg_string(f"{given},engine.prefix_cache=false", {"batch_size": 1})
    config = lm.lepton.config
    assert (config.model.path, config.model.tokenizer, config.mesh.model) == ("m", "other", 2)
    assert (config.engine.rows, config.engine.kv_dtype) == (4, "int8")
    assert (config.engine.prefix_cache, config.compression.preset) == (False, "none")


def test_a_refused_request_leaves_nothing_queued(monkeypatch):
    engine = FakeEngine()
    monkeypatch.setattr(evaluation, "LeptonEngine", lambda: FakeLepton(engine))
    lm = LeptonLM("model")
    for wrong in (("cd", {"num_beams": 4}), ("c" * 120, {"max_gen_toks": 100})):
        with pytest.raises(ValueError):
            lm.generate_until(asked(("ab", {}), wrong))
        assert not engine.has_work
    assert lm.generate_until(asked(("ef", {}), ("gh", {}))) == ["ef", "gh"]


def test_a_bar_is_shown_unless_lm_eval_wants_none(monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "LeptonEngine", lambda: FakeLepton(FakeEngine()))
    lm = LeptonLM("model")
    lm.generate_until(asked(("ef", {}), ("gh", {})), disable_tqdm=True)
    assert capsys.readouterr().err == ""
    lm.generate_until(asked(("ef", {}), ("gh", {})))
    assert "2/2" in capsys.readouterr().err


def test_an_answer_of_logits_that_are_not_finite_is_an_error(monkeypatch):
    engine = FakeEngine()
    engine.fails = {f"eval-{n}/0" for n in range(9)}
    monkeypatch.setattr(evaluation, "LeptonEngine", lambda: FakeLepton(engine))
    lm = LeptonLM("model")
    with pytest.raises(ValueError, match="not finite: try another dtype or preset"):
        lm.generate_until(asked(("ab", {}), ("cd", {})))
    assert not engine.has_work


def test_without_lm_eval_it_says_what_to_install():
    code = "import sys; sys.modules['lm_eval'] = None; import lepton_jax.evaluation"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert 'pip install "lepton_jax[eval]"' in said.stderr


@pytest.fixture(scope="module")
def lm(smollm2_path):
    return LeptonLM(str(smollm2_path), dtype="float32", max_length=64, batch_size=1)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_hugging_face_backend(lm, monkeypatch):
    monkeypatch.chdir(ROOT)
    found = simple_evaluate(
        model=lm,
        tasks=TASKS,
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        bootstrap_iters=0,
    )
    expected = json.loads((FOLDER / "smollm2.json").read_text())
    worst = worst_text = 0.0
    for task in TASKS:
        samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
        for sample, wanted in zip(samples, expected["resps"][task], strict=True):
            for got, want in zip(sample["resps"], wanted, strict=True):
                (got,), (want,) = got, want
                if task == "lepton_answers":
                    assert got == want
                elif task == "lepton_choices":
                    assert got[1] == want[1]
                    worst = max(worst, abs(got[0] - want[0]))
                else:  # the sum over a text of up to 150 tokens
                    tokens = len(lm.tok_encode(sample["doc"]["text"]))
                    worst_text = max(worst_text, abs(got - want))
                    worst = max(worst, abs(got - want) / tokens)
        for name, value in expected["results"][task].items():
            assert found["results"][task][name] == pytest.approx(value, rel=1e-3), (task, name)
    print(f"largest difference: of a log-probability {worst:.1e}, of a text's sum {worst_text:.1e}")
    assert worst <= LOGPROB_ERROR and worst_text <= 3 * LOGPROB_ERROR


@pytest.mark.slow
def test_the_command_that_is_documented(tmp_path, smollm2_path):
    settings = f"path={smollm2_path},dtype=float32,max_length=64,engine.page_size=16"
    command = [sys.executable, "-m", "lepton_jax.evaluation", "--model", "lepton_jax"]
    command += ["--model_args", settings, "--tasks", "lepton_choices", "--include_path", FOLDER]
    ran = subprocess.run(
        [*command, "--output_path", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (file,) = tmp_path.rglob("results*.json")
    found = json.loads(file.read_text())["results"]["lepton_choices"]
    wanted = json.loads((FOLDER / "smollm2.json").read_text())["results"]["lepton_choices"]
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-3)


@pytest.mark.slow
def test_chats_and_long_contexts(lm):
    text = lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text.endswith("<|im_start|>assistant\n") and "Hello" in text
    begun = [{"role": "user", "content": "Hi"}]
    assert not lm.apply_chat_template(begun, add_generation_prompt=False).endswith("assistant\n")
    assert lm.chat_template(True) == lm.tokenizer.chat_template and lm.chat_template() == ""
    assert lm.tokenizer_name.startswith("lepton_jax_")
    words = lm.tok_encode(" word" * 200, add_special_tokens=False)
    (long,) = lm._loglikelihood_tokens([(("", ""), words, words[:3])])
    (short,) = lm._loglikelihood_tokens([(("", ""), words[-62:], words[:3])])
    assert long == short  # the context is cut to what fits
    with pytest.raises(ValueError, match="65 tokens, more than max_length=64"):
        lm._loglikelihood_tokens([(("", ""), words[:1], words[:65])])
