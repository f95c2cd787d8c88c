"""What compression presets cost in accuracy: the KL divergence from the uncompressed model.

It is measured once for a model and preset, on held-out text, and kept beside the profiles.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression import quality
from lepton_jax.compression.calibration_data import HELD_OUT_TEXT, draw_windows
from lepton_jax.text.tokenizer import Tokenizer
from lepton_jax.whole_file import write_whole

_WINDOWS, _LENGTH = 4, 256


class Accuracy:
    """KL of presets, in nats a token: the upper end of its 95 % interval."""

    def __init__(self, tokenizer: Tokenizer, directory: Path, fingerprint: str):
        """`fingerprint` is the uncompressed model's; what was measured of it is remembered."""
        self._tokenizer = tokenizer
        self._path = directory / f"kl-{fingerprint}.json"
        self._known: dict[str, float] = {"none": 0.0}
        if self._path.exists():
            self._known |= _read(self._path)
        self._dense: quality.Reference | None = None

    def missing(self, presets: Sequence[str]) -> list[str]:
        """Those of which nothing is known."""
        return [preset for preset in presets if preset not in self._known]

    def kl(self, preset: str) -> float:
        """Of a preset that was measured."""
        return self._known[preset]

    def begin(self, dense: Loaded) -> None:
        """Runs the uncompressed model over held-out text."""
        length = min(_LENGTH, dense.config.max_position)
        encode = self._tokenizer.encode
        drawn = draw_windows(HELD_OUT_TEXT, encode, windows=_WINDOWS, length=length)
        self._dense = quality.reference(dense.model, dense.leaves, drawn.tokens)

    def measure(self, preset: str, loaded: Loaded) -> None:
        """Compares the compressed model with the one that `begin` saw."""
        found = quality.compare(self._dense, loaded.model, loaded.leaves, seed=0)
        self._known[preset] = found.kl.high
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, json.dumps(self._known, indent=2) + "\n")


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and tune again") from error
