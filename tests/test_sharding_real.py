"""SmolLM2 on several devices: transformers' tokens in float32, its three kv heads padded to four;
compressed, what one device gives to a long text, and as replicas.
"""

import functools
import json
from pathlib import Path

import pytest

from lepton_jax.api import LeptonEngine
from lepton_jax.config import EngineSection, MeshSection, ModelSection, RunConfig, SamplingParams

pytestmark = pytest.mark.slow

ROWS = json.loads((Path(__file__).parent / "fixtures/parity/smollm2.json").read_text())["rows"]
# One size of each program to compile.
SECTION = EngineSection(rows=4, kv_dtype="float32", max_len=256, prefill_chunk=128)


def shared_by(count, path, preset="", *, replicas=1):
    """The engine of a model that `count` devices share, as a driver makes it."""
    model = ModelSection(path=str(path), dtype="float32")
    mesh = MeshSection(data=replicas, model=count)
    config = RunConfig(model=model, mesh=mesh, engine=SECTION)
    return LeptonEngine().load_model(config=config, compression=preset)


def test_tokens_of_transformers(smollm2_path, caplog):
    rows = [row for row in ROWS if len(row["prompt"]) < 256][:6]
    with shared_by(4, smollm2_path) as lepton:
        assert "mesh.model=4 for 3 kv heads: padded to 4, 33 % more attention" in caplog.text
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        answers = lepton.generate([row["prompt"] for row in rows], params)
    assert [a.token_ids for a in answers] == [row["tokens"][:24] for row in rows]


# W8A8 rounds a device's part of a row of activations by its own scale: other tokens may come of it,
# no worse ones.
def test_loss_of_one_device_on_a_text(smollm2_path):
    ids = [token for row in ROWS[:3] for token in row["prompt"] + row["tokens"]][:240]
    losses = []
    for count in (1, 2):
        with shared_by(count, smollm2_path, "w8a8") as lepton:
            (row,) = lepton.score([lepton.tokenizer.decode(ids)])
            losses.append(-row["logprob"] / len(ids))
    print(f"loss {losses[0]:.4f} on one device, {losses[1]:.4f} on two")
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.fixture(scope="module")
def answers(smollm2_path):
    """Gives the tokens of eight rows in int8 on a mesh of data x model; each mesh runs once."""

    @functools.cache
    def on(replicas, count):
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        with shared_by(count, smollm2_path, "int8", replicas=replicas) as lepton:
            found = lepton.generate([row["prompt"][-48:] for row in ROWS[:8]], params)
        return [answer.token_ids for answer in found]

    return on


@pytest.mark.parametrize("mesh", [(2, 2), (8, 1)])
def test_replicas_give_the_tokens_of_one_device(answers, mesh):
    assert answers(*mesh) == answers(1, 1)
