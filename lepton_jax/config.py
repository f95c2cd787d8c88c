"""What a run is configured by: frozen sections, each field with its documentation.

The drivers turn a config file and flags into a `RunConfig` here and nowhere else; nothing below a driver reads flags or
environment variables. `from_mapping` refuses an unknown name with the nearest known one. Values are checked where
they are made (`__post_init__`), so a bad one is named before anything is loaded.
"""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _doc(default: Any, text: str) -> Any:
    if isinstance(default, dict):
        return dataclasses.field(default_factory=dict, metadata={"doc": text})
    return dataclasses.field(default=default, metadata={"doc": text})


def _check(section: object, name: str, allowed: bool, expected: str) -> None:
    if not allowed:
        value = getattr(section, name)
        raise ValueError(f"{type(section).__name__}: {name}={value!r} is not allowed: want {expected}")


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """An instance of a section from a mapping. Raises ValueError naming the nearest field on an unknown name."""
    known = [field.name for field in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: unknown field {name!r}{hint} (known: {', '.join(known)})")
    return cls(**values)


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = _doc(
        "",
        "Hugging Face directory, .gguf file, our Orbax directory, hf:org/name, or demo:smollm2",
    )
    dtype: str = _doc("auto", "dtype of weights: auto (float32 on CPU, else the file's), float32, bfloat16")
    tokenizer: str = _doc("", "directory or file to take the tokenizer from, where it isn't the model's")

    def __post_init__(self):
        _check(self, "dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int = _doc(1, "replicas; this release runs one")
    model: int = _doc(1, "devices that share one model; this release uses one")

    def __post_init__(self):
        for name in ("data", "model"):
            _check(self, name, getattr(self, name) == 1, "1 (this release runs on one device)")


@dataclasses.dataclass(frozen=True)
class EngineSection:
    rows: int = _doc(32, "requests decoded at once")
    page_size: int = _doc(64, "tokens in a page of the key-value cache")
    num_pages: int = _doc(0, "pages of the cache; 0: from the memory and the workload")
    prefill_chunk: int = _doc(512, "most prompt tokens computed in one program")
    decode_block: int = _doc(8, "most steps decoded on the device before the host looks")
    max_len: int = _doc(0, "most tokens of prompt and output; 0: the model's maximum, but at most 4096")
    kv_dtype: str = _doc("auto", "dtype of the cache: auto (that of the weights), float32, bfloat16")
    prefix_cache: bool = _doc(True, "reuse the cache of prompts that begin alike")

    def __post_init__(self):
        for name in ("rows", "page_size", "prefill_chunk", "decode_block"):
            _check(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("num_pages", "max_len"):
            _check(self, name, getattr(self, name) >= 0, "0 (chosen by the engine) or more")
        _check(self, "kv_dtype", self.kv_dtype in DTYPES, f"one of {', '.join(DTYPES)}")


@dataclasses.dataclass(frozen=True)
class CompressionSection:
    preset: str = _doc("none", "none, int8 (weights) or w8a8 (weights and activations)")


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one row are chosen and when it ends."""

    max_tokens: int = _doc(128, "most tokens to generate")
    min_tokens: int = _doc(0, "no end before this many tokens")
    temperature: float = _doc(0.0, "0: greedy; otherwise logits are divided by it")
    top_k: int = _doc(0, "sample from the k likeliest tokens; 0: off")
    top_p: float = _doc(1.0, "sample from the likeliest tokens that add up to this mass; 1: off")
    min_p: float = _doc(0.0, "drop tokens less likely than this share of the likeliest; 0: off")
    repetition_penalty: float = _doc(1.0, "divides (or multiplies) logits of tokens seen before; 1: off")
    presence_penalty: float = _doc(0.0, "subtracted from logits of tokens generated before")
    frequency_penalty: float = _doc(0.0, "subtracted once for every time a token was generated")
    logit_bias: Mapping[int, float] = _doc({}, "token id to a number added to its logit")
    seed: int | None = _doc(None, "of the row's random draws; none: derived from the row's id")
    n: int = _doc(1, "answers per row")
    stop: tuple[str, ...] = _doc((), "texts that end the row; they aren't part of the answer")
    stop_token_ids: tuple[int, ...] = _doc((), "ids that end the row")
    ignore_eos: bool = _doc(False, "go on after the model's end-of-text id")
    logprobs: int | None = _doc(None, "log-probabilities: of each token and of this many alternatives (0-20)")

    def __post_init__(self):
        object.__setattr__(self, "stop", self._texts())
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        bias = {int(i): float(b) for i, b in dict(self.logit_bias).items()}
        object.__setattr__(self, "logit_bias", bias)
        self._check_types()
        _check(self, "max_tokens", self.max_tokens >= 1, "1 or more")
        _check(self, "min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        _check(self, "temperature", 0 <= self.temperature < math.inf, "0 or more")
        _check(self, "top_k", self.top_k >= 0, "0 (off) or more")
        _check(self, "top_p", 0 < self.top_p <= 1, "more than 0, at most 1")
        _check(self, "min_p", 0 <= self.min_p <= 1, "0 (off) to 1")
        _check(self, "repetition_penalty", 0 < self.repetition_penalty < math.inf, "more than 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(self, name, -2 <= getattr(self, name) <= 2, "-2 to 2")
        finite = all(math.isfinite(b) for b in bias.values())
        _check(self, "logit_bias", finite, "finite numbers by token id")
        _check(self, "n", self.n >= 1, "1 or more")
        _check(self, "logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "none or 0 to 20")

    def _texts(self) -> tuple[str, ...]:
        texts = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"SamplingParams: stop={self.stop!r} is not allowed: want non-empty texts")
        return texts

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("max_tokens", "min_tokens", "top_k", "n", "seed", "logprobs"):
                good = isinstance(value, int) and not isinstance(value, bool)
                good |= value is None and field.default is None
                _check(self, field.name, good, "a whole number")
            elif isinstance(field.default, float):
                good = isinstance(value, (int, float)) and not isinstance(value, bool)
                _check(self, field.name, good, "a number")
        _check(self, "ignore_eos", isinstance(self.ignore_eos, bool), "true or false")
        good = all(isinstance(i, int) and not isinstance(i, bool) for i in self.stop_token_ids)
        _check(self, "stop_token_ids", good, "a list of token ids")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """From a row's "sampling" object. Raises ValueError on an unknown or impossible field."""
        return from_mapping(cls, values, where="sampling")


@dataclasses.dataclass(frozen=True)
class JobSection:
    mode: str = _doc("generate", "what to do with the rows: generate")
    input: str = _doc("", "JSONL file of rows")
    output: str = _doc("", "JSONL file to write; <output>.summary.json goes beside it")

    def __post_init__(self):
        _check(self, "mode", self.mode == "generate", "generate")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All sections of a run."""

    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    engine: EngineSection = dataclasses.field(default_factory=EngineSection)
    compression: CompressionSection = dataclasses.field(default_factory=CompressionSection)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    job: JobSection = dataclasses.field(default_factory=JobSection)
