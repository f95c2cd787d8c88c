"""What compression and a cache's dtype cost in accuracy: the KL divergence from the uncompressed
model.

It is measured once for a model and precision, on held-out text, and kept beside the profiles.
"""

import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp

from lepton_jax.checkpoints.loaded import Loaded
from lepton_jax.compression import quality
from lepton_jax.compression.calibration_data import HELD_OUT_TEXT, draw_windows
from lepton_jax.text.tokenizer import Tokenizer
from lepton_jax.whole_file import write_whole

_WINDOWS, _LENGTH = 4, 256
Precision = tuple[str, str]  # compression preset, dtype of the cache


class Accuracy:
    """KL of precisions, in nats a token: the upper end of its 95 % interval."""

    def __init__(self, tokenizer: Tokenizer, directory: Path, fingerprint: str):
        """`fingerprint` is the uncompressed model's; what was measured of it is remembered."""
        self._tokenizer = tokenizer
        self._path = directory / f"kl-{fingerprint}.json"
        self._known: dict[str, float] = {"none": 0.0}
        if self._path.exists():
            self._known |= _read(self._path)
        self._dense: quality.Reference | None = None

    def kl(self, precision: Precision) -> float | None:
        """None where nothing was measured."""
        return self._known.get(_name(precision))

    def measure(self, precision: Precision, load: Callable[[str], Loaded]) -> float:
        """Of (preset, dtype of the cache), measured now unless it is known; `load` gives the model
        with a preset.
        """
        if self.kl(precision) is None:
            preset, kv_dtype = precision
            if self._dense is None:
                self._dense = self._reference(load("none"))
            loaded = load(preset)
            kv = None if kv_dtype == "auto" else jnp.dtype(kv_dtype)
            dense, leaves = self._dense, loaded.leaves
            found = quality.compare(dense, loaded.model, leaves, seed=0, kv_dtype=kv)
            self._known[_name(precision)] = found.kl.high
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self._path, json.dumps(self._known, indent=2) + "\n")
        return self._known[_name(precision)]

    def _reference(self, dense: Loaded) -> quality.Reference:
        """The uncompressed model over held-out text."""
        length = min(_LENGTH, dense.config.max_position)
        drawn = draw_windows(HELD_OUT_TEXT, self._tokenizer, windows=_WINDOWS, length=length)
        return quality.reference(dense.model, dense.leaves, drawn.tokens)


def _name(precision: Precision) -> str:
    preset, kv_dtype = precision
    return preset if kv_dtype == "auto" else f"{preset}, cache {kv_dtype}"


def _read(path: Path) -> dict[str, float]:
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and tune again") from error
