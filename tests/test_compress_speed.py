"""Dense and compressed are timed in turns where both fit into memory, else one after the other."""

import types

import jax
import psutil
import pytest
from compress_makers import RECEIPT, model_folder

from lepton_jax import compress
from lepton_jax.config import EngineSection, ReceiptSection, RunConfig
from lepton_jax.jobs import measures


class Clock:
    """A bench whose runs take what the machine's mood and a model's name make of them."""

    mood = iter(())
    ran: list = []

    def __init__(self, loaded, section, *, workload):
        self.name, self.work = loaded.name, workload

    def run(self, prompts):
        Clock.ran.append((self.name, self.work.kind, prompts[0][0]))
        return types.SimpleNamespace(
            rate=next(Clock.mood) * {"dense": 1.0, "small": 2.0}[self.name]
        )


def side(name):
    config = types.SimpleNamespace(max_position=256, vocab_size=1_000)
    return types.SimpleNamespace(name=name, config=config), EngineSection()


def test_sides_take_turns_on_the_same_prompts_and_the_first_run_of_each_is_not_counted(monkeypatch):
    moods = [9, 9, 1.0, 1.0, 0.5, 0.5]  # a machine that gets slower slows both
    monkeypatch.setattr(Clock, "mood", iter(moods * 2))
    monkeypatch.setattr(Clock, "ran", [])
    monkeypatch.setattr(measures, "Bench", Clock)
    told = []
    dense, small = measures.rates(
        [side("dense"), side("small")], repeats=2, progress=lambda *at: told.append(at)
    )
    assert dense == {"decode": 1.0, "prefill": 1.0} and small == {"decode": 2.0, "prefill": 2.0}
    names = [(name, kind) for name, kind, _ in Clock.ran]
    turn = [("dense", "decode"), ("small", "decode")]
    assert names == turn * 3 + [(name, "prefill") for name, _ in turn] * 3
    firsts = [first for _, _, first in Clock.ran]
    assert firsts[::2] == firsts[1::2] and len(set(firsts)) > 3
    assert [at[:2] for at in told] == [(0, 2), (1, 2), (2, 2)]


def test_room_is_counted_in_dense_models(monkeypatch):
    free = types.SimpleNamespace(available=3_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert measures.fit_together(750) and not measures.fit_together(751)
    chip = types.SimpleNamespace(
        memory_stats=lambda: {"bytes_limit": 10_000, "bytes_in_use": 3_000}
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [chip])
    assert measures.fit_together(1_500) and not measures.fit_together(1_501)


def test_a_receipt_says_where_there_was_no_room_for_turns(tmp_path, monkeypatch):
    model, output = model_folder(tmp_path / "hf"), tmp_path / "int8"
    monkeypatch.setattr(measures, "fit_together", lambda dense: False)
    timed = []

    def of_their_bytes(sides, *, repeats, progress):
        timed.append([loaded.bytes for loaded, _ in sides])
        return [dict.fromkeys(("decode", "prefill"), 1e6 / loaded.bytes) for loaded, _ in sides]

    monkeypatch.setattr(measures, "rates", of_their_bytes)
    config = RunConfig(
        receipt=ReceiptSection(**RECEIPT | {"repeats": 2, "prompts": 0}),
        engine=EngineSection(rows=2, page_size=16),
    )
    made = compress(model, output, preset="int8", config=config)
    size, speed = made["size"], made["speed"]
    assert timed == [[size["dense_bytes"]], [size["device_bytes"]]]
    assert not speed["turns"] and speed["repeats"] == 2
    expected = size["dense_bytes"] / size["device_bytes"]
    assert speed["decode"]["ratio"] == speed["prefill"]["ratio"] == pytest.approx(expected)
    page = " ".join((output / "receipt.html").read_text().split())
    assert "The best of 2 runs of each, those of the dense model first" in page
