"""compress from Python and the command line, on a tiny model: directories, receipts, mistakes."""

import dataclasses
import html
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from compress_makers import CANDIDATES, RECEIPT, config_file, edit_receipt, model_folder
from forked_drivers import ENVIRONMENT, forks_of

from lepton_jax import LeptonEngine, compress
from lepton_jax.checkpoints.load import identify, load
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.presets import scheme_of_each
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import (
    CalibrationSection,
    CompressionSection,
    EngineSection,
    HostsSection,
    MeshSection,
    ModelSection,
    ReceiptSection,
    RecoverySection,
    RunConfig,
)
from lepton_jax.engine.sizing import kv_dtype_of
from lepton_jax.jobs import measures
from lepton_jax.jobs.verify import failures, report, verify_receipt
from lepton_jax.tensors import CompressedTensor

QUICK = ReceiptSection(**RECEIPT | {"prompts": 0})
# Of one row and one size: what is asked and what is timed share the engine's programs.
ENGINE = EngineSection(
    rows=1, page_size=16, num_pages=10, max_len=128, prefill_chunk=128, kv_dtype="int8"
)
CONFIG = RunConfig(receipt=QUICK, calibration=CalibrationSection(windows=4, window_tokens=32))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A compressed model with all that is measured, and its receipt."""
    output = tmp_path_factory.mktemp("whole") / "int8"
    section = ReceiptSection(**RECEIPT | {"repeats": 1})
    seen = []
    config = RunConfig(receipt=section, engine=ENGINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_ROWS", ENGINE.rows)
        made = compress(
            model, output, preset="int8", config=config, progress=lambda *call: seen.append(call)
        )
    return output, made, seen


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """One with a receipt of no answers and no times."""
    output = tmp_path_factory.mktemp("plain") / "w8a8"
    compress(model, output, preset="w8a8", config=CONFIG)
    return output


def weights_of(loaded):
    return receipts.weights_sha256(loaded.model.specs, loaded.leaves)


@pytest.fixture
def copy(whole, tmp_path):
    """A compressed model to damage."""
    return shutil.copytree(whole[0], tmp_path / "copy")


def test_the_directory_loads_like_any_other(whole, model):
    output, made, _ = whole
    plain = load(model)
    with LeptonEngine() as engine:
        engine.load_model(output)
        assert engine.receipt == json.loads((output / "receipt.json").read_text())
        assert engine.receipt["digest"] == made["digest"]
        assert engine.fingerprint == made["fingerprint"] != plain.fingerprint
        assert engine.loaded.bytes == made["size"]["device_bytes"] < 0.3 * plain.bytes
    assert receipts.of_loaded(model, plain.fingerprint) is None


def test_what_the_receipt_holds(whole, model):
    output, made, _ = whole
    dense = load(model)
    assert made["source"]["fingerprint"] == dense.fingerprint
    assert made["source"]["weights_sha256"] == weights_of(dense)
    assert made["size"]["dense_bytes"] == dense.bytes
    files = [f.stat().st_size for f in output.rglob("*") if f.is_file()]
    assert sum(files) > made["size"]["disk_bytes"] > made["size"]["device_bytes"]
    assert 0 < made["quality"]["kl"]["low"] < made["quality"]["kl"]["value"] < 0.1
    assert made["greedy_prefix"]["of"] == 6 and made["greedy_prefix"]["prompts"] == 2
    assert made["speed"]["turns"]
    page = " ".join((output / "receipt.html").read_text().split())
    assert "The best of 1 run of each, which took turns" in page
    decode = made["speed"]["decode"]
    assert decode["ratio"] == pytest.approx(1 / decode["measured_time_ratio"])
    assert decode["ideal_compute_ratio"] == made["size"]["kept_fraction"] == 1
    assert made["held_out"]["path"] == "shipped: heldout.txt"
    errors = {row["path"]: row["error"] for row in made["weights"]}
    assert set(errors) == {p for p, spec in dense.model.specs.items() if spec.inputs}
    leaves = dict(zip(dense.model.specs, dense.leaves, strict=True))
    smaller = dict(zip(dense.model.specs, load(output).leaves, strict=True))
    for path, error in errors.items():
        exact = np.asarray(leaves[path])
        off = np.linalg.norm(np.asarray(smaller[path].dense(np.float32)) - exact)
        assert error == pytest.approx(off / np.linalg.norm(exact), rel=1e-3)


@pytest.fixture
def asked(monkeypatch):
    """Dtypes of the caches that models were asked with, in their order; they answer nothing."""
    dtypes = []

    def answers(side, *, windows, **_):
        loaded, section = side
        compressed = any(isinstance(leaf, CompressedTensor) for leaf in loaded.leaves)
        own = loaded.model.specs["embed"].dtype
        dtypes.append(kv_dtype_of(section, own, compressed=compressed).name)
        return [[1, 2, 3]] * len(windows)

    monkeypatch.setattr(measures, "greedy_answers", answers)
    return dtypes


def test_both_models_have_the_dense_ones_cache_unless_the_recipe_names_another(
    model, tmp_path, asked
):
    made = compress(model, tmp_path / "int8", preset="int8", config=CONFIG)
    assert asked == ["float32", "float32"]
    assert made["caches"] == {"dense": "float32", "compressed": "float32"}
    assert '"compressed": "float32"' in html.unescape((tmp_path / "int8/receipt.html").read_text())
    config = dataclasses.replace(CONFIG, engine=EngineSection(kv_dtype="bfloat16"))
    made = compress(model, tmp_path / "narrow", preset="int8", config=config)
    assert asked[2:] == ["float32", "bfloat16"]
    assert made["caches"] == {"dense": "float32", "compressed": "bfloat16"}
    del asked[:]
    assert not failures(verify_receipt(tmp_path / "int8"))
    assert not failures(verify_receipt(tmp_path / "narrow"))
    assert asked == ["float32", "float32", "float32", "bfloat16"]


def test_a_receipt_of_before_is_verified_by_the_rule_that_it_was_measured_by(
    model, tmp_path, asked
):
    compress(model, tmp_path / "int8", preset="int8", config=CONFIG)
    edit_receipt(tmp_path / "int8", lambda receipt: receipt.pop("caches"))
    del asked[:]
    assert not failures(verify_receipt(tmp_path / "int8"))
    assert asked == ["float32", "bfloat16"]


def test_the_tokenizer_that_the_config_names_is_kept(model, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text((model / "tokenizer.json").read_text() + "\n")
    config = RunConfig(
        model=ModelSection(tokenizer=str(other)), receipt=ReceiptSection(compare=False)
    )
    compress(model, tmp_path / "int8", preset="int8", config=config)
    kept = load(tmp_path / "int8").tokenizer_source
    assert (kept if kept.is_file() else kept / "tokenizer.json").read_text() == other.read_text()


def test_progress_names_each_weight(whole, model):
    names = [what for stage, _, _, what in whole[2] if stage == "compress"]
    assert names == list(load(model).model.specs)


def test_verification_reproduces_the_receipt(whole):
    checks = verify_receipt(whole[0])
    assert not failures(checks), report(checks)
    names = [check.name for check in checks]
    assert {"weights_sha256", "kl", "perplexity", "greedy prefix"} <= set(names)


def times(found, name, factor):
    found[name] *= factor


FLATTERY = {  # by the check that sees it
    "source's weights": lambda r: r["source"].update(weights_sha256="0" * 64),
    "held-out text": lambda r: r["held_out"].update(sha256="0" * 64),
    "places": lambda r: times(r["quality"], "places", 2),
    "perplexity": lambda r: times(r["quality"]["perplexity"], "high", 0.99),
    "dense_perplexity": lambda r: times(r["quality"]["dense_perplexity"], "value", 1.01),
    "perplexity_ratio": lambda r: times(r["quality"]["perplexity_ratio"], "low", 0.99),
    "kl": lambda r: times(r["quality"]["kl"], "value", 0.9),
    "top1": lambda r: times(r["quality"]["top1"], "value", 1.01),
    "top5": lambda r: times(r["quality"]["top5"], "low", 1.01),
    "with its cache: kl": lambda r: times(r["kv"]["kl"], "high", 0.9),
    "greedy prefix": lambda r: r["greedy_prefix"].update(value=13.0),
    "speed: prefill": lambda r: times(r["speed"]["prefill"], "measured_time_ratio", 0.9),
    "speed: saved": lambda r: r["speed"]["saved"].update(memory="none saved"),
}


def test_a_receipt_that_flatters_is_not_reproduced(copy):
    edit_receipt(copy, lambda r: [change(r) for change in FLATTERY.values()])
    assert failures(verify_receipt(copy)) == list(FLATTERY)


@pytest.mark.parametrize(
    "name",
    "dense_bytes device_bytes disk_bytes parameters kept kept_fraction compute_fraction".split(),
)
def test_sizes_of_a_receipt_are_counted_again(copy, name):
    edit_receipt(copy, lambda r: times(r["size"], name, 2))
    assert failures(verify_receipt(copy)) == [name]


@pytest.mark.parametrize("field", ["bytes", "kept", "type"])
def test_rows_of_a_receipt_are_made_again(copy, field):
    edit_receipt(copy, lambda r: times(r["weights"][2], field, 2))
    path = receipts.read(copy)["weights"][2]["path"]
    assert failures(verify_receipt(copy)) == [f"{field} of {path}"]


def test_a_receipt_of_other_weights(copy, plain):
    shutil.copy(plain / "receipt.json", copy / "receipt.json")
    assert "weights_sha256" in failures(verify_receipt(copy))
    with pytest.raises(ValueError, match=r"receipt.json is the receipt of other weights"):
        LeptonEngine().load_model(copy)


def test_verification_needs_the_model_that_was_compressed(whole, tmp_path):
    stranger = model_folder(tmp_path / "stranger", seed=1)
    with pytest.raises(ValueError, match=r"isn't the model that was compressed: .*--dense"):
        verify_receipt(whole[0], dense=str(stranger))


def test_a_value_that_no_fingerprint_samples_is_seen(plain, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-4] ^= 1  # the last bit of the last float32
    (other / "model.safetensors").write_bytes(weights)
    assert identify(other) == receipts.read(plain)["source"]["fingerprint"]
    assert failures(verify_receipt(plain, dense=str(other))) == ["source's weights"]


def test_calibrated_rules(model, tmp_path):
    rules = (r"layers\..* -> weights=int4 group=16 rounding=gptq", "embed -> weights=int8")
    made = compress(model, tmp_path / "gptq", rules=rules, config=CONFIG)
    assert made["calibration"]["path"] == "shipped: calibration.txt"
    assert len(made["calibration"]["starts"]) == 4
    assert made["calibration"]["sha256"] != made["held_out"]["sha256"]
    assert made["source"]["weights_sha256"] == weights_of(load(model))
    rows = {row["path"]: row for row in made["weights"]}
    assert rows["layers.1.down"]["product_error"] < rows["layers.1.down"]["error"]
    assert rows["embed"]["product_error"] is None and rows["head"]["error"] == 0
    assert made["recipe"]["rules"] == list(rules) and made["recipe"]["options"]["damp"] == 0.01
    assert not failures(verify_receipt(tmp_path / "gptq"))
    with pytest.raises(ValueError, match=r"rounding=gptq' needs calibration.*lepton_jax.compress"):
        LeptonEngine().load_model(
            model, config=RunConfig(compression=CompressionSection(rules=rules))
        )


def test_dense_weights_go_as_compressed_ones_come(model, tmp_path):
    live = []

    def look(stage, *_):
        if stage == "compress":
            live.append(sum(array.nbytes for array in jax.live_arrays()))

    rules = ("head|layers.* -> weights=int4 group=16 rounding=gptq",)
    config = dataclasses.replace(CONFIG, receipt=ReceiptSection(compare=False))
    made = compress(model, tmp_path / "out", rules=rules, config=config, progress=look)
    sizes = {}
    for row in made["weights"]:
        place = row["path"].partition(".")[2].partition(".")[0] or row["path"]
        sizes[place] = sizes.get(place, 0) + 4 * np.prod(row["shape"])
    freed = -np.diff(live)  # by the second layer and the head: what int4 leaves, and statistics
    for found, dense in zip(freed, (sizes["1"], sizes["head"]), strict=True):
        assert found > 0.5 * dense


def test_a_budget_becomes_rules_and_an_8_bit_cache_is_measured_too(model, tmp_path):
    asked = CompressionSection(auto_bytes=0.23, candidates=CANDIDATES)
    engine = EngineSection(kv_dtype="int8")
    settings = dataclasses.replace(CONFIG, compression=asked, engine=engine)
    made = compress(model, tmp_path / "auto", config=settings)
    found, size = made["sensitivity"], made["size"]
    assert found["schemes"] == list(CANDIDATES)
    assert size["device_bytes"] == found["predicted_bytes"] <= 0.23 * size["dense_bytes"]
    assert found["predicted_kl"] == pytest.approx(made["quality"]["kl"]["value"], rel=0.8)
    chosen = scheme_of_each(Recipe.of(rules=made["recipe"]["rules"]).rules, load(model).model.specs)
    for row in found["weights"]:
        scheme = Recipe.of(rules=(f".* -> {CANDIDATES[row['chosen']]}",)).rules[0].action
        assert chosen[row["path"]] == scheme
    assert len({row["chosen"] for row in found["weights"]}) > 1
    assert made["recipe"]["title"] == "auto_bytes=0.23"
    assert made["kv"]["dtype"] == "int8" and made["kv"]["kl"] != made["quality"]["kl"]
    page = (tmp_path / "auto" / "receipt.html").read_text()
    assert "Sensitivity of each weight" in page and "key-value cache in int8" in page
    checks = verify_receipt(tmp_path / "auto")
    assert not failures(checks) and "with its cache: kl" in [check.name for check in checks]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"auto_bytes": 0.01},
            r"budget of \d+ bytes: the smallest .* is \d+, 0\.1\d+ of the model in float32",
        ),
        ({"auto_bytes": 0.5, "auto_kl": 0.1}, "are both given"),
        ({"auto_kl": 0.1, "candidates": ()}, "compression.candidates is empty"),
        ({"auto_kl": 0.1, "preset": "int8"}, "auto_kl=0.1 finds the rules itself"),
        (
            {"auto_kl": 0.1, "candidates": ("weights=int8 activations=static",)},
            r"activations='static'.* can't be tried without calibration of its own",
        ),
        (
            {"auto_kl": 0.1, "candidates": ("weights=int3",)},
            r"^compression.candidates .*int3.*allowed are int8",
        ),
    ],
)
def test_budgets_that_can_not_be_are_refused_before_anything_is_read(model, tmp_path, fields, says):
    with pytest.raises(ValueError, match=says):
        settings = dataclasses.replace(CONFIG, compression=CompressionSection(**fields))
        compress(model, tmp_path / "no", config=settings)
    assert not (tmp_path / "no").exists()


def test_a_smaller_model_is_quantized_and_loads(model, tmp_path):
    """Fewer layers, heads and channels, then int8: what the config says is what `run` gets."""
    small = CompressionSection(drop_layers=1, keep_ffn=0.5, keep_kv_heads=1, preset="int8")
    settings = dataclasses.replace(CONFIG, compression=small)
    made = compress(model, tmp_path / "out", config=settings)
    assert made["recipe"]["structure"]["keep_ffn"] == 0.5 and made["recipe"]["preset"] == "int8"
    assert made["recipe"]["title"] == "drop_layers=1 keep_ffn=0.5 keep_kv_heads=1; int8"
    assert len(made["structured"]["influence"]) == 2 and len(made["structured"]["layers"]) == 1
    assert len(made["structured"]["kv_heads"][0]) == 1
    D, F, H, V = 32, 64, 8, 260  # one of two layers, one of two kv heads with its two query heads
    kept = D * (4 * H) + D * (2 * H) + 3 * D * F // 2 + V * D
    whole = 2 * (D * 8 * H + D * 4 * H + 3 * D * F) + V * D
    size = made["size"]
    assert (size["kept"], size["parameters"]) == (kept, whole)
    assert f"k/N {kept / whole:.2f}" in made["digest"]
    page = (tmp_path / "out" / "receipt.html").read_text()
    assert "Influence of each layer" in page and "keep_kv_heads" in page
    assert not failures(verify_receipt(tmp_path / "out"))
    with LeptonEngine() as engine:
        engine.load_model(tmp_path / "out")
        assert engine.loaded.config.num_layers == 1 and engine.loaded.config.ffn_size == F // 2
        assert engine.generate("Hello")[0].token_ids
    with pytest.raises(ValueError, match=r"drop_layers=1 .* needs calibration"):
        LeptonEngine().load_model(model, config=RunConfig(compression=small))


def test_without_comparison_only_sizes_and_errors(model, tmp_path):
    config = RunConfig(receipt=ReceiptSection(compare=False))
    made = compress(model, tmp_path / "out", preset="int4", config=config)
    assert made["source"]["weights_sha256"] == weights_of(load(model))
    assert made["quality"] is made["speed"] is made["held_out"] is None
    assert "of the bytes" in made["digest"] and "KL" not in made["digest"]
    checks = verify_receipt(tmp_path / "out")
    assert not failures(checks) and "kl" not in [check.name for check in checks]
    (tmp_path / "out" / "receipt.html").write_text("int4: KL 0")
    assert failures(verify_receipt(tmp_path / "out")) == ["receipt.html"]
    file = tmp_path / "out" / "receipt.json"
    file.write_text(file.read_text().replace(made["digest"], "int4: KL 0"))
    assert failures(verify_receipt(tmp_path / "out")) == ["digest", "receipt.html"]


def config(**sections):
    return RunConfig(**{"receipt": QUICK} | sections)


def test_mistakes_are_named_before_anything_is_written(model, tmp_path):
    long = ReceiptSection(**RECEIPT | {"window_tokens": 500})
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    calibration = CalibrationSection(text=str(short), windows=4, window_tokens=32)
    same = tmp_path / "same.txt"
    same.write_text("The same words over and over. " * 100)
    twice = CalibrationSection(text=str(same), windows=4, window_tokens=32)
    gptq = ("embed|head -> keep", r".* -> weights=int8 rounding=gptq")
    mistakes = [
        (dict(preset="none"), config(), "nothing to do"),
        (
            {},
            config(compression=CompressionSection(drop_layers=2)),
            r"compression.drop_layers=2: this model allows 0 to 1",
        ),
        (dict(rules=("leyer.* -> weights=int8",)), config(), r"match no parameter.*'leyer\.\*'"),
        (dict(rules=("embed -> weights=int2",)), config(), "int2.*allowed are int8"),
        (dict(preset="int5"), config(), "'int5' is unknown"),
        (
            dict(preset="int8"),
            config(compression=CompressionSection(smooth="smoothquant")),
            "compression.smooth='smoothquant' changes nothing here",
        ),
        (
            dict(preset="int8"),
            config(compression=CompressionSection(candidates=("weights=int8",))),
            r"candidates=\('weights=int8',\) changes nothing here, it is for auto_bytes and",
        ),
        (dict(preset="w8a8"), config(calibration=calibration), r"text='.*short.txt' changes not"),
        (dict(preset="int8"), config(recovery=RecoverySection(train="lora")), "no weight of a lay"),
        (dict(preset="int8"), config(mesh=MeshSection(model=2)), "mesh.model=2: compress works on"),
        (dict(preset="int8"), config(hosts=HostsSection("h:1")), "compress works in one process"),
        (dict(preset="int8"), config(engine=EngineSection(speculation="draft")), "take off or loo"),
        (dict(preset="int8"), config(receipt=long), "window_tokens is 500, but the model.*128"),
        (
            dict(preset="int8"),
            config(receipt=ReceiptSection(text=str(short), windows=2, window_tokens=32, prompts=0)),
            r"short.txt: 2 windows of 32 tokens need 64 tokens, and the text has 10",
        ),
        (
            dict(rules=gptq),
            config(calibration=calibration),
            r"short.txt: 4 windows of 32 tokens need 128 tokens, and the text has 10",
        ),
        (
            dict(rules=gptq),
            config(
                calibration=twice,
                receipt=ReceiptSection(**RECEIPT | {"prompts": 0, "text": str(same)}),
            ),
            "calibration.text and receipt.text are the same",
        ),
    ]
    for recipe, settings, says in mistakes:
        with pytest.raises(ValueError, match=says):
            compress(model, tmp_path / "out", config=settings, **recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"preset": "int8", "alpha": 0.7}, "alpha=0.7 changes nothing here, it is for smooth="),
        ({"preset": "int8", "act_order": True}, "act_order=True changes nothing here"),
        ({"damp": 0.1}, "damp=0.1 changes nothing here"),
        ({"preset": "int8", "candidates": ("weights=int8",)}, "candidates=.* changes nothing here"),
    ],
)
def test_loading_refuses_options_that_change_nothing(model, fields, says):
    with pytest.raises(ValueError, match=rf"compression\.{says}"):
        LeptonEngine().load_model(model, config=RunConfig(compression=CompressionSection(**fields)))


def test_outputs_that_exist_are_left_alone(model, plain, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"out exists: name a new directory or remove it"):
        compress(model, tmp_path / "out", preset="int8", config=CONFIG)
    with pytest.raises(ValueError, match="holds compressed weights"):
        compress(plain, tmp_path / "again", preset="int8", config=CONFIG)


@pytest.mark.parametrize("compare", [True, False])
def test_weights_that_are_not_finite_are_named(tmp_path, compare):
    down = np.ones((32, 64), np.float32)
    down[3, 5] = np.nan
    broken = model_folder(tmp_path / "nan", layers_1_mlp_down_proj=down)
    settings = RunConfig(receipt=ReceiptSection(**RECEIPT | {"compare": compare}))
    with pytest.raises(ValueError, match=r"nan.*: weight layers.1.down has values that are not fi"):
        compress(broken, tmp_path / "out", preset="int8", config=settings)
    assert not (tmp_path / "out").exists()


KILLED = """
import sys, time
from pathlib import Path
from lepton_jax.jobs import compress
write = compress.write_receipt

def stuck(folder, final):
    write(folder, final)
    Path(sys.argv[3]).write_text(str(folder))
    time.sleep(600)

compress.write_receipt = stuck
from lepton_jax.config import ReceiptSection, RunConfig
config = RunConfig(receipt=ReceiptSection(compare=False))
from lepton_jax import api
api.compress(sys.argv[1], sys.argv[2], preset="int8", config=config)
"""


def test_a_killed_process_leaves_nothing_that_loads(model, tmp_path):
    output, mark = tmp_path / "out", tmp_path / "mark"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, model, output, mark],
        env=ENVIRONMENT,
    )
    deadline = time.monotonic() + 240
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    scratch = Path(mark.read_text())
    settings = RunConfig(receipt=ReceiptSection(compare=False))
    beside = compress(model, tmp_path / "out2", preset="int8", config=settings)
    assert scratch.exists() and not output.exists()  # a living process keeps its directory
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (scratch / "manifest.json").exists() and not output.exists()
    made = compress(model, output, preset="int8", config=settings)
    assert made["weights_sha256"] == beside["weights_sha256"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["mark", "out", "out2"]


def test_the_command_line(model, tmp_path):
    file = config_file(tmp_path / "config.py", compression={"preset": "w8a8"})
    flags = [f"--config={file}", f"--config.model.path={model}", "--config.receipt.prompts=0"]
    command = [sys.executable, "-m", "lepton_jax.compress", *flags]
    command += [f"--config.output={tmp_path / 'out'}"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("w8a8: KL ") and str(tmp_path / "out") in done.stdout
    assert "compress" in done.stderr


@pytest.fixture(scope="module")
def drive():
    """A compressing driver's end in a folder."""
    with forks_of("compress", imports=("jobs.compress", "jobs.sweep", "jobs.verify")) as drive:
        yield drive


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config is missing"),
        (["--config={file}"], "output is empty"),
        (["--config={file}", "--config.output={out}", "--config.model.path=gone"], "doesn't exist"),
        (["--verify", "{gone}"], "has no receipt.json"),
        (["--config={file}", "--dense=gone"], "--dense=gone goes with --verify=DIR alone"),
        (["--config={file}", "--verify", "{gone}"], "from DIR's receipt: leave out --config"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(drive, tmp_path, arguments, says):
    names = {"out": tmp_path / "out", "gone": tmp_path / "gone"}
    names["file"] = config_file(tmp_path / "config.py", compression={"preset": "int8"})
    done = drive(tmp_path, *(argument.format(**names) for argument in arguments))
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_verification_from_the_command_line(drive, plain, tmp_path):
    done = drive(tmp_path, "--verify", str(plain))
    assert done.returncode == 0, done.stderr
    assert "weights_sha256" in done.stdout and done.stdout.endswith("w8a8: reproduced\n")
    changed = shutil.copytree(plain, tmp_path / "changed")
    edit_receipt(changed, lambda r: times(r["size"], "kept", 2))
    done = drive(tmp_path, "--verify", str(changed))
    assert done.returncode == 1 and "not reproduced: kept" in done.stdout
