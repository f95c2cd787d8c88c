"""What compression is configured by: the recipe, its calibration, recovery and receipt.

The frozen sections `compression`, `calibration`, `recovery` and `receipt` of a run; `config.py` has
the others and is where all are imported from.
"""

import dataclasses
import math

from lepton_jax.config_fields import MOST as _MOST
from lepton_jax.config_fields import check as _check
from lepton_jax.config_fields import check_types as _check_types
from lepton_jax.config_fields import doc as _doc

RECOVERIES = ("none", "norms", "lora", "all")


@dataclasses.dataclass(frozen=True)
class CompressionSection:
    preset: str = _doc("none", "none, int8, int8_g32, w8a8, int4 or fp8")
    rules: tuple[str, ...] = _doc(
        (), "instead of a preset: PATTERN -> FIELD=VALUE ..., the first that matches a weight wins"
    )
    smooth: str = _doc(
        "none", "smoothquant or awq: fold scales into neighbouring weights first (calibrated)"
    )
    alpha: float = _doc(0.5, "of smoothquant: 1 moves all difficulty to the weights, 0 none")
    ranges: str = _doc("absmax", "of static activations: absmax, percentile or mse")
    percentile: float = _doc(99.9, "of ranges=percentile")
    damp: float = _doc(
        0.01, "of gptq, sparsegpt and keep_*: share of the mean diagonal that is added"
    )
    act_order: bool = _doc(False, "gptq takes inputs with large activations first")
    drop_layers: int = _doc(0, "remove this many layers, those of least influence (calibrated)")
    keep_ffn: float = _doc(1.0, "keep this share of the ffn channels (calibrated); 1: all")
    keep_kv_heads: int = _doc(
        0, "keep this many kv heads with their query heads (calibrated); 0: all"
    )
    keep_experts: int = _doc(0, "keep this many experts (calibrated); 0: all")
    auto_bytes: float = _doc(
        0.0,
        "automatic mixed precision: the candidate for each weight that loses least within so many "
        "bytes, up to 1 a share of the model's in float32 (calibrated)",
    )
    auto_kl: float = _doc(
        0.0, "or the smallest of which the predicted KL is at most this, in nats a token"
    )
    candidates: tuple[str, ...] = _doc(
        (
            "weights=int8 group=32",
            "weights=int8",
            "weights=int4 group=32",
            "weights=int4 group=64",
            "weights=int4 group=128",
        ),
        "what auto_bytes and auto_kl choose from: FIELD=VALUE ... as in rules, or keep; of "
        "rounding=gptq the KL is predicted as of rounding=nearest, which usually loses more",
    )

    def __post_init__(self):
        _check_types(self)
        for name, example in (
            ("rules", "embed|head -> weights=int8"),
            ("candidates", "weights=int4 group=32"),
        ):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else value
            good = isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts)
            _check(self, name, good, f"a list of texts such as {example!r}")
            object.__setattr__(self, name, tuple(texts))
        for name in ("auto_bytes", "auto_kl"):
            good = 0 <= getattr(self, name) < math.inf
            _check(self, name, good, "0 (off) or more")


@dataclasses.dataclass(frozen=True)
class CalibrationSection:
    text: str = _doc(
        "",
        'text to calibrate on, or .jsonl with "text" or "messages" in each row; empty: the one '
        "that ships",
    )
    windows: int = _doc(64, "windows that are drawn from it")
    window_tokens: int = _doc(512, "tokens in a window, which starts afresh")
    seed: int = _doc(0, "of the draw")

    def __post_init__(self):
        _check_types(self)
        _check(self, "windows", 1 <= self.windows <= _MOST, "1 or more")
        _check(self, "window_tokens", 2 <= self.window_tokens <= _MOST, "2 or more")
        _check(self, "seed", 0 <= self.seed <= _MOST, "0 or more")


@dataclasses.dataclass(frozen=True)
class RecoverySection:
    """Of compress: training the compressed model to predict what the dense one does."""

    train: str = _doc(
        "none",
        "none; norms: norm scales, biases and scales of quantized weights; lora: these and a "
        "low-rank change of float weights; all: these and all kept float weights of the layers",
    )
    steps: int = _doc(400, "updates")
    minutes: float = _doc(0.0, "end earlier after this long; 0: when the steps are done")
    learning_rate: float = _doc(
        1e-3, "of Adam, relative to the root mean square of what it changes; falls in a cosine"
    )
    batch: int = _doc(1, "windows of an update")
    windows: int = _doc(136, "windows of calibration.text, of calibration.window_tokens each")
    held_out: int = _doc(8, "of these windows, only watched: the best step on them is taken")
    evaluate_every: int = _doc(25, "steps between looks at them")
    patience: int = _doc(4, "looks without gain that end the training; 0: it goes on")
    rank: int = _doc(16, "of train=lora")
    hidden_weight: float = _doc(1.0, "of the hidden states' relative error beside KL in the loss")
    seed: int = _doc(0, "of the order of windows and of lora's start")
    tensorboard: str = _doc("", "folder for TensorBoard's event files of the training; empty: none")

    def __post_init__(self):
        _check_types(self)
        _check(self, "train", self.train in RECOVERIES, f"one of {', '.join(RECOVERIES)}")
        for name in ("steps", "batch", "windows", "held_out", "evaluate_every", "rank"):
            _check(self, name, 1 <= getattr(self, name) <= _MOST, "1 or more")
        for name in ("patience", "seed"):
            _check(self, name, 0 <= getattr(self, name) <= _MOST, "0 or more")
        _check(self, "minutes", 0 <= self.minutes < math.inf, "0 (off) or a number of minutes")
        _check(self, "learning_rate", 0 < self.learning_rate < 1, "between 0 and 1")
        _check(self, "hidden_weight", 0 <= self.hidden_weight < math.inf, "0 or more")
        good = self.held_out < self.windows
        _check(self, "held_out", good, f"fewer than recovery.windows={self.windows}")
        for field in dataclasses.fields(self):
            good = self.train != "none" or getattr(self, field.name) == field.default
            wanted = f"{field.default!r} without training, or recovery.train=norms, lora or all"
            _check(self, field.name, good, wanted)


@dataclasses.dataclass(frozen=True)
class ReceiptSection:
    compare: bool = _doc(
        True, "measure against the uncompressed model; false where that doesn't fit in memory"
    )
    text: str = _doc(
        "",
        'held-out text, or .jsonl with "text" or "messages" in each row; empty: the one that ships',
    )
    windows: int = _doc(16, "windows of held-out text")
    window_tokens: int = _doc(512, "tokens in a window, which starts afresh")
    prompts: int = _doc(16, "prompts whose greedy answers are compared; 0: none")
    new_tokens: int = _doc(48, "tokens of each such answer")
    repeats: int = _doc(3, "timed runs of each, dense and compressed, prefill and decode; 0: none")
    seed: int = _doc(0, "of the drawn windows and of the bootstrap that gives confidence intervals")

    def __post_init__(self):
        _check_types(self)
        _check(self, "windows", 2 <= self.windows <= _MOST, "2 or more")
        _check(self, "window_tokens", 16 <= self.window_tokens <= _MOST, "16 or more")
        _check(self, "new_tokens", 1 <= self.new_tokens <= _MOST, "1 or more")
        good = self.prompts != 1 and 0 <= self.prompts <= self.windows  # one has no interval
        _check(self, "prompts", good, "0, or 2 to receipt.windows")
        for name in ("repeats", "seed"):
            _check(self, name, 0 <= getattr(self, name) <= _MOST, "0 or more")
