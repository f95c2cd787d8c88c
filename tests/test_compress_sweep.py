"""Sweeps of recipes over a tiny model: interrupted, recovered, with budgets, and mistakes."""

import dataclasses
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from compress_makers import CANDIDATES, RECEIPT, model_folder

from lepton_jax import compress
from lepton_jax.compression import automatic
from lepton_jax.compression import receipt as receipts
from lepton_jax.config import (
    CalibrationSection,
    EngineSection,
    ModelSection,
    ReceiptSection,
    RecoverySection,
    RunConfig,
    SweepSection,
)
from lepton_jax.jobs import compress as jobs
from lepton_jax.jobs.sweep import SweepJob
from lepton_jax.jobs.verify import verify_receipt

ROOT = Path(__file__).parents[1]
QUICK = ReceiptSection(**RECEIPT | {"prompts": 0})
CALIBRATION = CalibrationSection(windows=4, window_tokens=32)
RECIPES = {"int8": {"preset": "int8"}, "int4": {"rules": (r"layers\..* -> weights=int4 group=16",)}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "hf")


def test_a_sweep_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        sweep=SweepSection(recipes=RECIPES),
        output=str(tmp_path / "sweep"),
    )
    real, tried = jobs.compress, []

    def interrupted(config, recipe, dense, *, progress):
        tried.append(recipe.title)
        if len(tried) == 2:
            raise KeyboardInterrupt
        return real(config, recipe, dense, progress=progress)

    monkeypatch.setattr("lepton_jax.jobs.sweep.compress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        SweepJob(settings).run()
    assert (tmp_path / "sweep" / "int8" / "receipt.json").exists()
    assert not (tmp_path / "sweep" / "int4").exists()
    job = SweepJob(settings)
    found = job.run()
    assert tried == ["int8", "weights=int4 group=16", "weights=int4 group=16"]
    assert list(found) == ["int8", "int4"]
    assert found["int8"]["quality"]["kl"]["value"] < found["int4"]["quality"]["kl"]["value"]
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [row["recipe"] for row in table] == ["dense", "int8", "int4"]
    assert job.table().splitlines()[3].startswith("| int8")
    assert "decode time" not in job.table()  # nothing was timed
    assert "Pareto" in (tmp_path / "sweep" / "pareto.html").read_text()
    assert not list((tmp_path / "sweep").rglob("manifest.json"))
    with pytest.raises(ValueError, match="without its weights: sweep again with sweep.keep=true"):
        verify_receipt(tmp_path / "sweep" / "int8")
    other = dataclasses.replace(settings, receipt=ReceiptSection(**RECEIPT))
    with pytest.raises(ValueError, match="holds a sweep of another receipt"):
        SweepJob(other).run()
    for engine in (EngineSection(kv_dtype="int8"), EngineSection(rows=2)):
        other = dataclasses.replace(settings, engine=engine)
        with pytest.raises(ValueError, match="holds a sweep of another engine"):
            SweepJob(other).run()
    other = dataclasses.replace(settings, calibration=CalibrationSection(seed=1))
    with pytest.raises(ValueError, match="holds a sweep of another calibration"):
        SweepJob(other).run()
    (tmp_path / "taken").mkdir()
    with pytest.raises(ValueError, match=r"taken exists and is no sweep's"):
        SweepJob(dataclasses.replace(settings, output=str(tmp_path / "taken"))).run()


def test_a_recipe_that_was_left_out_is_not_forgotten(model, tmp_path, monkeypatch):
    """Its receipt stays, so the same name can't become another recipe's."""

    def sweep(**recipes):
        settings = dict(sweep=SweepSection(recipes=recipes), output=str(tmp_path / "sweep"))
        SweepJob(RunConfig(model=ModelSection(path=str(model)), receipt=QUICK, **settings))._begin()

    sweep(a=RECIPES["int8"], b=RECIPES["int4"])
    sweep(a=RECIPES["int4"], b=RECIPES["int4"])  # nothing was made of it yet
    (tmp_path / "sweep" / "a").mkdir()
    (tmp_path / "sweep" / "a" / "receipt.json").write_text("{}")
    sweep(b=RECIPES["int4"])
    with pytest.raises(ValueError, match="holds a sweep of another recipe a: name a new"):
        sweep(a=RECIPES["int8"], b=RECIPES["int4"])


def test_a_recipe_that_fails_is_told_and_the_others_go_on(model, tmp_path, monkeypatch, capsys):
    real = jobs.compress

    def fails(config, recipe, dense, *, progress):
        if recipe.title == "int8":
            raise ValueError("embed|head:\nnot finite")
        if recipe.title == "w8a8":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(config, recipe, dense, progress=progress)

    monkeypatch.setattr("lepton_jax.jobs.sweep.compress", fails)
    sweep = SweepSection(recipes={"w8a8": {"preset": "w8a8"}} | RECIPES, only="w8a8,int8,int4")
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        sweep=sweep,
        output=str(tmp_path / "sweep"),
    )
    driver = runpy.run_path(str(ROOT / "lepton_jax" / "compress.py"))
    assert driver["main"](settings) == 1
    text = capsys.readouterr().out.splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in text[2:-1]]
    assert names == ["dense", "w8a8", "int8", "int4"]
    assert text[0].rstrip("| ").endswith("| failed")
    assert "RESOURCE_EXHAUSTED" in text[3]
    assert text[4].rstrip("| ").endswith(r"| embed\|head: not finite")
    table = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert [row["failed"] for row in table] == [
        "",
        "RESOURCE_EXHAUSTED: out of memory",
        "embed|head: not finite",
        "",
    ]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == ["int4"]
    monkeypatch.setattr("lepton_jax.jobs.sweep.compress", real)
    again = dataclasses.replace(settings, sweep=dataclasses.replace(sweep, only=("int8",)))
    job = SweepJob(again)
    assert set(job.run()) == {"int8", "int4"} and not job.failed and "failed" not in job.table()


def test_a_recipe_may_have_a_cache_and_times_stand_beside_the_ideal(model, tmp_path, monkeypatch):
    timed = []

    def reading_weights(sides, work, repeats):
        timed.append([section.kv_dtype for _, section in sides])
        return [[1e6 / loaded.bytes] * repeats for loaded, _ in sides]

    monkeypatch.setattr("lepton_jax.jobs.measures._in_turns", reading_weights)
    pruned = r"layers\..* -> weights=keep prune=magnitude sparsity=0.5"
    recipes = {"cached": {"preset": "int8", "kv_dtype": "int8"}, "zeros": {"rules": (pruned,)}}
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=dataclasses.replace(QUICK, repeats=1),
        sweep=SweepSection(recipes=recipes),
        output=str(tmp_path / "sweep"),
    )
    found = SweepJob(settings).run()
    # Decode and prefill of each, the dense model beside it.
    assert timed == [["float32", "int8"]] * 2 + [["float32", "float32"]] * 2
    dense, cached, zeros = json.loads((tmp_path / "sweep" / "table.json").read_text())
    assert "KL with its cache" in (tmp_path / "sweep" / "table.md").read_text()
    assert cached["KL with its cache"] not in ("", cached["KL, nats a token"])
    assert zeros["KL with its cache"] == dense["decode time"] == dense["saves"] == ""
    ideal = found["zeros"]["size"]["compute_fraction"]
    assert zeros["ideal time"] == f"{ideal:.3f}" != cached["ideal time"] == "1.000"
    assert zeros["decode time"] == zeros["prefill time"] == "1.000" and zeros["saves"] == "nothing"
    assert cached["decode time"] == cached["prefill time"] == cached["of dense"] < "0.3"
    assert cached["saves"] == "memory, decode, prefill"
    other = dataclasses.replace(
        settings, sweep=SweepSection(recipes=recipes | {"cached": {"preset": "int8"}})
    )
    with pytest.raises(ValueError, match="holds a sweep of another recipe cached"):
        SweepJob(other).run()
    with pytest.raises(ValueError, match="kv_dtype='int9' is not allowed: want one of auto, float"):
        SweepSection(recipes={"plain": {"kv_dtype": "int9"}})


def test_some_recipes_keep_the_calibration_text_that_others_read(model, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("Some words to calibrate on. " * 200)
    gptq = {"rules": ("layers.* -> weights=int8 rounding=gptq",)}
    calibration = CalibrationSection(text=str(text), windows=4, window_tokens=32)
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        calibration=calibration,
        sweep=SweepSection(recipes=RECIPES | {"gptq": gptq}, only="int8"),
        output=str(tmp_path / "sweep"),
    )
    assert set(SweepJob(settings).run()) == {"int8"}
    alone = dataclasses.replace(settings, sweep=SweepSection(recipes=RECIPES, only="int8"))
    with pytest.raises(ValueError, match="calibration.text=.* changes nothing here"):
        SweepJob(alone).run()
    with pytest.raises(ValueError, match="sweep.recipes are for the driver"):
        compress(model, tmp_path / "out", preset="int8", config=settings)


def test_only_names_recipes():
    with pytest.raises(ValueError, match=r"only=\('int9',\) is not allowed: want .*: int8, int4"):
        SweepSection(recipes=RECIPES, only="int9")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (
            {"rules": (".* -> weights=int8 rounding=gptq",)},
            r"compression rule '\.\*': the embedding is looked up",
        ),
        (
            {"rules": (".* -> weights=keep prune=magnitude sparsity=0.5 pattern=192x32",)},
            "embed: tiles of 192x32 do not cover 260 outputs",
        ),
        ({"drop_layers": 1, "smooth": "awq"}, "compression.smooth='awq' changes nothing here"),
        ({"preset": "int8", "recovery": {"train": "lora"}}, "recovery.train='lora': no weight"),
        ({"auto_bytes": 0.9, "recovery": {"train": "lora"}}, "recovery.train='lora': no weight"),
    ],
)
def test_a_recipe_that_does_not_fit_is_named_before_anything_is_measured(
    model, tmp_path, monkeypatch, recipe, says
):
    monkeypatch.setattr("lepton_jax.jobs.sweep.measure_dense", None)
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        calibration=CALIBRATION,
        sweep=SweepSection(recipes=RECIPES | {"other": recipe}),
        output=str(tmp_path / "sweep"),
    )
    with pytest.raises(ValueError, match=rf"^sweep.recipes\['other'\]: {says}"):
        SweepJob(settings).run()
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_measures_sensitivities_once(model, tmp_path, monkeypatch):
    real, measured = automatic.measure_sensitivity, []

    def noted(*arguments, **options):
        measured.append(real(*arguments, **options))
        return measured[-1]

    monkeypatch.setattr(automatic, "measure_sensitivity", noted)
    budgets = {"small": 0.2, "large": 0.24}
    recipes = {n: {"auto_bytes": b, "candidates": CANDIDATES} for n, b in budgets.items()}
    with_gptq = tuple(f"{candidate} rounding=gptq" for candidate in CANDIDATES)
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        calibration=CALIBRATION,
        sweep=SweepSection(
            recipes=recipes | {"gptq": {"auto_bytes": 0.24, "candidates": with_gptq}}
        ),
        output=str(tmp_path / "sweep"),
    )
    found = SweepJob(settings).run()
    assert len(measured) == 1
    told = [found[name]["sensitivity"] for name in budgets]
    assert told[0]["predicted_kl"] > told[1]["predicted_kl"]
    assert found["gptq"]["sensitivity"] == told[1] | {"schemes": list(with_gptq)}
    assert found["gptq"]["size"] == found["large"]["size"]
    rules = dict(rule.split(" -> ") for rule in found["gptq"]["recipe"]["rules"])
    assert len(rules) == 3 and "gptq" not in rules.pop("embed")  # it is looked up, not multiplied
    assert all("rounding=gptq" in scheme for scheme in rules.values())
    for one in told:
        read = receipts.read_sensitivity(one)
        assert (read.paths, read.schemes) == (measured[0].paths, measured[0].schemes)
        assert np.array_equal(read.kl, measured[0].kl)
        assert np.array_equal(read.bytes, measured[0].bytes)


def test_a_recipe_of_a_sweep_may_recover(model, tmp_path):
    recovery = {"train": "norms", "steps": 2, "windows": 6, "held_out": 2, "evaluate_every": 1}
    settings = RunConfig(
        model=ModelSection(path=str(model)),
        receipt=QUICK,
        calibration=CALIBRATION,
        sweep=SweepSection(
            recipes={"drop": {"drop_layers": 1}}
            | {"recovered": {"drop_layers": 1, "recovery": recovery}}
        ),
        output=str(tmp_path / "sweep"),
    )
    found = SweepJob(settings).run()
    assert found["drop"]["recovery"] is None
    told = found["recovered"]["recovery"]
    assert told["steps_done"] == 2
    assert told["before"]["perplexity"] == found["drop"]["quality"]["perplexity"]
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir() if p.is_dir()) == [
        "drop",
        "recovered",
    ]
    given = dataclasses.replace(settings, recovery=RecoverySection(train="norms"))
    with pytest.raises(ValueError, match="recovery and sweep.recipes are both given: put its"):
        SweepJob(given)
    with pytest.raises(ValueError, match=r"'drop'\]: recovery is 'norms': want a mapping"):
        SweepSection(recipes={"drop": {"drop_layers": 1, "recovery": "norms"}})
