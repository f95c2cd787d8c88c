"""Texts that calibration reads and quality is measured on: what they share is told or refused."""

import pytest
from compress_makers import model_folder

from lepton_jax.compression.calibration_data import HELD_OUT_TEXT
from lepton_jax.config import CalibrationSection, ModelSection, ReceiptSection, RunConfig
from lepton_jax.jobs.compress_inputs import describe, require_texts

TEXT = HELD_OUT_TEXT.read_text(encoding="utf-8")
SIZES = dict(windows=4, window_tokens=64)


def look_at(tmp_path, seen, held_out):
    """At these texts, before anything is compressed."""
    for name, text in (("seen.txt", seen), ("held_out.txt", held_out)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    config = RunConfig(
        model=ModelSection(path=str(model_folder(tmp_path / "model"))),
        calibration=CalibrationSection(text=str(tmp_path / "seen.txt"), **SIZES),
        receipt=ReceiptSection(text=str(tmp_path / "held_out.txt"), prompts=0, **SIZES),
    )
    require_texts(config, describe(config), calibrated=True)


def test_a_text_with_another_beginning_is_the_same_text(tmp_path):
    with pytest.raises(ValueError, match=r"\d\d\.\d% of what .*held_out.txt.* share passages"):
        look_at(tmp_path, TEXT[:330], "And so on. " + TEXT[:330])


def test_a_passage_in_both_is_told(tmp_path, caplog):
    passage = TEXT[2000:2060]
    look_at(tmp_path, passage + TEXT[:210], passage + TEXT[4000:4210])
    assert "of what quality is measured on (receipt.text" in caplog.text
    assert "is in what calibration reads (calibration.text" in caplog.text


def test_texts_that_share_nothing_are_fine(tmp_path, caplog):
    look_at(tmp_path, TEXT[:500], TEXT[4000:4500])
    assert not caplog.text
