"""What a run is configured by: frozen sections, each field with its documentation.

The drivers turn a config file and flags into a `RunConfig` (`cli.py`); nothing below a driver reads
flags, nor environment variables but those that say where caches lie. An unknown name is refused
with the nearest known one. Values are checked where they are made (`__post_init__`), so a bad one
is named before anything is loaded. Sections of jobs are in `config_jobs.py`, those of compression
in `config_compression.py`; how fields are documented and checked: `config_fields.py`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lepton_jax import config_fields
from lepton_jax.config_compression import CalibrationSection as CalibrationSection
from lepton_jax.config_compression import CompressionSection as CompressionSection
from lepton_jax.config_compression import ReceiptSection as ReceiptSection
from lepton_jax.config_compression import RecoverySection as RecoverySection
from lepton_jax.config_fields import from_mapping as from_mapping
from lepton_jax.config_fields import refuse_unknown as refuse_unknown
from lepton_jax.config_jobs import MODES as MODES
from lepton_jax.config_jobs import CascadeSection as CascadeSection
from lepton_jax.config_jobs import JobSection as JobSection
from lepton_jax.config_jobs import ScoringSection as ScoringSection

_doc, _check = config_fields.doc, config_fields.check
_check_types, _is_number = config_fields.check_types, config_fields.is_number
_listed = config_fields.listed

SPECULATION = ("off", "lookup", "draft")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "int8", "float8_e4m3fn")
FEEDBACKS = ("off", "deterministic", "on")
OBJECTIVES = ("throughput", "latency", "cost")
_MOST = config_fields.MOST
_MOST_ANSWERS = 256
_MOST_BIAS = 1e6
_HOTTEST = 1e30  # also as float32 neither it nor its inverse is infinite or 0
_MOST_PORT = 65534  # the next one is used too
_CONSTRAINTS = ("choices", "regex", "json_schema")  # of which an answer has one at most


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = _doc(
        "",
        "Hugging Face directory, .gguf file, our Orbax directory, hf:org/name, "
        "hf:org/name/file.gguf, or demo:smollm2; to plan also a config.json or published:NAME, "
        "such as published:llama-3.1-8b",
    )
    dtype: str = _doc(
        "auto",
        "dtype of weights: auto (float32 on CPU, else the file's), float32, bfloat16, float16",
    )
    tokenizer: str = _doc(
        "", "directory or file to take the tokenizer from, where it isn't the model's"
    )
    chat_variables: Mapping[str, Any] = _doc(
        {}, 'what the chat template reads beside messages, as in {"enable_thinking": false}'
    )

    def __post_init__(self):
        _check_types(self)
        _check(self, "dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        taken = ("messages", "tools", "add_generation_prompt")
        config_fields.variables(self, "chat_variables", taken=taken)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int = _doc(1, "replicas in this process, each on mesh.model devices of its own")
    model: int = _doc(1, "devices that share one model, each with a part of every weight")
    expert: int = _doc(
        1,
        "of these, over how many experts are spread, a divisor of mesh.model; 1: each device has a "
        "part of every expert",
    )

    def __post_init__(self):
        _check_types(self)
        for name in ("data", "model", "expert"):
            _check(self, name, 1 <= getattr(self, name) <= _MOST, "1 or more")
        _check(self, "expert", self.model % self.expert == 0, f"a divisor of model={self.model}")


@dataclasses.dataclass(frozen=True)
class PoolSection:
    """Of replicas as Ray actors, and of all replicas."""

    ray: int = _doc(0, "replicas as Ray actors, each with mesh.data x mesh.model devices; 0: none")
    address: str = _doc("", "of a running Ray cluster, as in auto; empty: Ray on this machine")
    cpus: float = _doc(1.0, "cores of an actor, and without devices the ones that it keeps to")
    gpus: float = _doc(0.0, "GPUs of an actor")
    tpus: float = _doc(0.0, "TPU chips of an actor")
    stall_seconds: float = _doc(
        300.0,
        "without progress, after which idle replicas take over the rows of a replica; with "
        "job.exact=false only: otherwise all wait for the slowest",
    )

    def __post_init__(self):
        _check_types(self)
        _check(self, "ray", 0 <= self.ray <= _MOST, "0 (none) or more")
        for name in ("cpus", "gpus", "tpus"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        _check(self, "stall_seconds", self.stall_seconds > 0, "more than 0")


@dataclasses.dataclass(frozen=True)
class HostsSection:
    """Of several hosts that run one program together."""

    coordinator: str = _doc(
        "", "HOST:PORT of host 0 (the next port is used too), or auto on TPU pods and Slurm"
    )
    count: int = _doc(1, "hosts; not needed with auto")
    index: int = _doc(0, "of this host, from 0; not needed with auto")
    timeout: float = _doc(300.0, "seconds to wait for the others at start")

    def __post_init__(self):
        _check_types(self)
        host, _, port = self.coordinator.rpartition(":")
        good = host and port.isdecimal() and 1 <= int(port) <= _MOST_PORT
        good = good or self.coordinator in ("", "auto")
        wanted = f"HOST:PORT with a port from 1 to {_MOST_PORT}, auto, or nothing"
        _check(self, "coordinator", bool(good), wanted)
        _check(self, "count", 1 <= self.count <= _MOST, "1 or more")
        _check(self, "index", 0 <= self.index < self.count, f"0 to {self.count - 1} (hosts.count)")
        _check(self, "timeout", 1 <= self.timeout < math.inf, "1 or more")


@dataclasses.dataclass(frozen=True)
class EngineSection:
    rows: int = _doc(32, "requests decoded at once")
    page_size: int = _doc(64, "tokens in a page of the key-value cache")
    num_pages: int = _doc(
        0, "pages of each device's cache; 0: by the workload and the memory (of a CPU's a quarter)"
    )
    cache_share: float = _doc(
        1.0, "share of the memory for caches that this engine takes, where others are on its device"
    )
    prefill_chunk: int = _doc(512, "most prompt tokens computed in one program")
    prefill_sizes: tuple[int, ...] = _doc(
        (), "prompt tokens of smaller programs, such as 96,200; empty: halves of prefill_chunk"
    )
    decode_block: int = _doc(8, "most steps decoded on the device before the host looks")
    max_len: int = _doc(
        0, "most tokens of prompt and output; 0: the model's maximum, but at most 4096"
    )
    kv_dtype: str = _doc(
        "auto",
        "dtype of the cache: auto (that of the weights; bfloat16 where they are compressed), "
        "float32, bfloat16, float16; int8 or float8_e4m3fn for half the memory",
    )
    attention_block: int = _doc(
        0, "cached tokens that attention reads at a time, whole pages; 0: the kernel's own choice"
    )
    prefix_cache: bool = _doc(True, "reuse the cache of prompts that begin alike")
    speculation: str = _doc(
        "off",
        "off; lookup: propose what followed earlier in the row's text; draft: what a model says",
    )
    draft_model: str = _doc("", "path of the draft model, of the same tokenizer; empty: model.path")
    draft_preset: str = _doc("none", "compression preset of the draft model")
    draft_tokens: int = _doc(7, "most tokens proposed for a row and step")
    draft_cost: float = _doc(
        0.0,
        "of one more token in a step, beside a step of one; 0: measured, assumed with job.exact",
    )

    def __post_init__(self):
        _check_types(self)
        _listed(self, "prefill_sizes", int)
        good = all(0 < size <= _MOST for size in self.prefill_sizes)
        _check(self, "prefill_sizes", good, "sizes of 1 or more")
        for name in ("rows", "page_size", "prefill_chunk", "decode_block", "draft_tokens"):
            _check(self, name, 1 <= getattr(self, name) <= _MOST, "1 or more")
        for name in ("num_pages", "max_len"):
            _check(self, name, 0 <= getattr(self, name) <= _MOST, "0 (the engine chooses) or more")
        whole = 0 <= self.attention_block <= _MOST and self.attention_block % self.page_size == 0
        _check(self, "attention_block", whole, f"0, or pages of engine.page_size={self.page_size}")
        _check(self, "cache_share", 0 < self.cache_share <= 1, "more than 0, at most 1")
        _check(self, "kv_dtype", self.kv_dtype in KV_DTYPES, f"one of {', '.join(KV_DTYPES)}")
        _check(self, "draft_cost", 0 <= self.draft_cost < math.inf, "0 (measured) or more")
        good = self.speculation in SPECULATION
        _check(self, "speculation", good, f"one of {', '.join(SPECULATION)}")


@dataclasses.dataclass(frozen=True)
class SweepSection:
    recipes: Mapping[str, Mapping[str, Any]] = _doc(
        {},
        "name to fields of compression, kv_dtype as in engine, and under recovery to the fields of "
        "that: compress tries each of them on the model",
    )
    only: tuple[str, ...] = _doc(
        (), "names of the recipes to try, such as int8,int4; empty: all of them"
    )
    keep: bool = _doc(False, "keep the compressed weights of each recipe, not just its receipt")

    def __post_init__(self):
        _check_types(self)
        _listed(self, "only")
        good = isinstance(self.recipes, Mapping) and all(
            isinstance(name, str) and isinstance(fields, Mapping)
            for name, fields in self.recipes.items()
        )
        _check(self, "recipes", good, "a mapping of names to fields of compression")
        for name, fields in self.recipes.items():
            plain = bool(name) and all(c.isalnum() or c in "-_" for c in name)
            _check(self, "recipes", plain, "names of letters, digits, - and _")
            recipe_sections(name, fields)
        known = ", ".join(self.recipes) or "none, sweep.recipes is empty"
        _check(self, "only", set(self.only) <= set(self.recipes), f"names of recipes: {known}")


def recipe_sections(
    name: str, fields: Mapping[str, Any], *, engine: EngineSection | None = None
) -> tuple[CompressionSection, RecoverySection, EngineSection]:
    """What one of `sweep.recipes` stands for, with the sweep's engine or the default one.

    Raises ValueError naming the field that is wrong.
    """
    where = f"sweep.recipes[{name!r}]"
    compression = dict(fields)
    recovery = compression.pop("recovery", {})
    cache = {key: compression.pop(key) for key in ("kv_dtype",) if key in compression}
    if not isinstance(recovery, Mapping):
        raise ValueError(f"{where}: recovery is {recovery!r}: want a mapping of its fields")
    return (
        from_mapping(CompressionSection, compression, where=where),
        from_mapping(RecoverySection, recovery, where=f"{where}['recovery']"),
        dataclasses.replace(engine or EngineSection(), **cache),
    )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one row are chosen and when it ends."""

    max_tokens: int = _doc(128, "most tokens to generate, also of batch requests that don't say")
    min_tokens: int = _doc(0, "no end before this many tokens")
    temperature: float = _doc(0.0, "0: greedy; otherwise logits are divided by it")
    top_k: int = _doc(0, "sample from the k likeliest tokens; 0: off")
    top_p: float = _doc(1.0, "sample from the likeliest tokens that add up to this mass; 1: off")
    min_p: float = _doc(0.0, "drop tokens less likely than this share of the likeliest; 0: off")
    repetition_penalty: float = _doc(
        1.0, "divides positive and multiplies negative logits of tokens seen before; 1: off"
    )
    presence_penalty: float = _doc(0.0, "subtracted from logits of tokens generated before")
    frequency_penalty: float = _doc(0.0, "subtracted once for every time a token was generated")
    logit_bias: Mapping[int, float] = _doc({}, "token id to a number added to its logit")
    seed: int | None = _doc(None, "of the row's random draws; none: derived from the row's id")
    n: int = _doc(1, "answers per row; the i-th takes seed + i")
    stop: tuple[str, ...] = _doc((), "texts that end the row; they aren't part of the answer")
    stop_token_ids: tuple[int, ...] = _doc((), "ids that end the row")
    ignore_eos: bool = _doc(False, "go on after the model's end-of-text id")
    choices: tuple[str, ...] = _doc((), "the answer is one of these texts")
    regex: str = _doc("", "all of the answer matches this regular expression (of Rust's kind)")
    json_schema: Mapping[str, Any] = _doc({}, "the answer is JSON of this schema")
    logprobs: int | None = _doc(
        None, "log-probabilities: of each token and of this many alternatives (0-20)"
    )

    def __post_init__(self):
        _check_types(self)
        object.__setattr__(self, "stop", self._stop_texts())
        object.__setattr__(self, "stop_token_ids", self._stop_ids())
        object.__setattr__(self, "logit_bias", self._bias())
        _check(self, "max_tokens", 1 <= self.max_tokens <= _MOST, f"1 to {_MOST}")
        _check(self, "min_tokens", 0 <= self.min_tokens <= self.max_tokens, "0 to max_tokens")
        _check(self, "temperature", 0 <= self.temperature <= _HOTTEST, f"0 to {_HOTTEST:g}")
        _check(self, "top_k", 0 <= self.top_k <= _MOST, f"0 (off) to {_MOST}")
        _check(self, "top_p", 0 < self.top_p <= 1, "more than 0, at most 1")
        _check(self, "min_p", 0 <= self.min_p <= 1, "0 (off) to 1")
        good = 1 / _HOTTEST <= self.repetition_penalty <= _HOTTEST
        _check(self, "repetition_penalty", good, f"{1 / _HOTTEST:g} to {_HOTTEST:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(self, name, -2 <= getattr(self, name) <= 2, "-2 to 2")
        _check(self, "n", 1 <= self.n <= _MOST_ANSWERS, f"1 to {_MOST_ANSWERS}")
        few = self.logprobs is None or 0 <= self.logprobs <= 20
        _check(self, "logprobs", few, "none or 0 to 20")
        self._check_constraint()

    @property
    def guided(self) -> str:
        """The one field that prescribes the answer's form; "" where none does."""
        return next((name for name in _CONSTRAINTS if getattr(self, name)), "")

    def _check_constraint(self) -> None:
        texts = self.choices
        good = isinstance(texts, (list, tuple)) and len(texts) != 1
        good = good and all(isinstance(text, str) and text for text in texts)
        _check(self, "choices", good, f"two or more texts: {config_fields.A_LIST}")
        object.__setattr__(self, "choices", tuple(texts))
        _check(self, "json_schema", isinstance(self.json_schema, Mapping), "an object")
        others = [name for name in _CONSTRAINTS if getattr(self, name) and name != self.guided]
        for name in others:
            _check(self, name, False, f"nothing beside {self.guided}: an answer has one form")

    def _stop_texts(self) -> tuple[str, ...]:
        texts = [self.stop] if isinstance(self.stop, str) else self.stop
        good = isinstance(texts, (list, tuple)) and all(isinstance(t, str) and t for t in texts)
        _check(self, "stop", good, "a non-empty text or a list of them")
        return tuple(texts)

    def _stop_ids(self) -> tuple[int, ...]:
        ids = self.stop_token_ids
        good = isinstance(ids, (list, tuple)) and all(_is_number(i, int) for i in ids)
        _check(self, "stop_token_ids", good, "a list of token ids")
        return tuple(ids)

    def _bias(self) -> dict[int, float]:
        """JSON has only text keys, so an id may be written as one."""
        wanted = f"token ids with numbers from {-_MOST_BIAS:g} to {_MOST_BIAS:g}"
        _check(self, "logit_bias", isinstance(self.logit_bias, Mapping), wanted)
        bias = {}
        for key, value in self.logit_bias.items():
            an_id = _is_number(key, int) or (isinstance(key, str) and key.isdecimal())
            good = an_id and _is_number(value, (int, float)) and abs(value) <= _MOST_BIAS
            _check(self, "logit_bias", good, wanted)
            bias[int(key)] = float(value)
        return bias


@dataclasses.dataclass(frozen=True)
class BenchSection:
    measure: str = _doc(
        "all", "all, or some of starts, decode_1, decode_8, decode_32, prefill_512x1, ..., job"
    )
    repeats: int = _doc(3, "timed runs of each measurement, after one that isn't counted")

    def __post_init__(self):
        _check_types(self)
        _check(self, "repeats", 1 <= self.repeats <= _MOST, "1 or more")


@dataclasses.dataclass(frozen=True)
class OptimizerSection:
    feedback: str = _doc(
        "deterministic",
        "knobs of the engine are set while a job runs: off; deterministic: by what is counted; on: "
        "by the clock too, which needs job.exact=false",
    )
    profile: str = _doc(
        "auto",
        "what tune found, for fields that aren't given: auto (where one fits, on one host), off, "
        "or a file",
    )
    objective: str = _doc(
        "throughput",
        "throughput, latency (then run queues nothing), or cost (of a token); tune and run alike",
    )
    max_kl: float = _doc(
        0.0, "tune: most nats a token by which a compressed model may diverge; 0: none is tried"
    )
    max_ttft: float = _doc(
        0.0, "tune: most seconds to the first token, 95th percentile; 0: no bound"
    )
    memory: int = _doc(0, "tune: bytes of the device to use; 0: what it has")
    sample: int = _doc(96, "tune: requests of the input that candidates are tried on")
    trials: int = _doc(5, "tune: candidates that are run before the best of them is varied")
    repeats: int = _doc(
        2, "tune: runs of each, of which the quickest counts; close ones then take turns"
    )
    log: str = _doc("", "file that each decision of the feedback is added to as a line of JSON")

    def __post_init__(self):
        _check_types(self)
        _check(self, "feedback", self.feedback in FEEDBACKS, f"one of {', '.join(FEEDBACKS)}")
        for name in ("sample", "trials", "repeats"):
            _check(self, name, 1 <= getattr(self, name) <= _MOST, "1 or more")
        for name in ("max_kl", "max_ttft", "memory"):
            _check(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        _check(self, "profile", bool(self.profile), "auto, off, or a file")
        _check(self, "objective", self.objective in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        told = not self.log or self.feedback != "off"
        _check(self, "log", told, "'' with feedback='off', or feedback='deterministic'")


@dataclasses.dataclass(frozen=True)
class PlanSection:
    """Of `python -m lepton_jax.plan`."""

    topology: str = _doc("", "TPU slice to plan for, such as v5e:2x4; empty: the device at hand")
    context: int = _doc(0, "tokens that a row has cached in a step; 0: engine.max_len")
    compile: bool = _doc(True, "compile the programs; false: from shapes alone, in seconds")
    target: float = _doc(0.0, "search: generated tokens/s that all devices must reach; 0: any")
    chips: tuple[str, ...] = _doc((), "search: kinds of chips, such as v5e,v6e; empty: all")
    presets: tuple[str, ...] = _doc(
        ("none", "int8", "w8a8", "int4"), "search: compression presets, the least lossy first"
    )
    most_chips: int = _doc(64, "search: of a slice")

    def __post_init__(self):
        _check_types(self)
        for name in ("chips", "presets"):
            _listed(self, name)
        _check(self, "presets", len(self.presets) > 0, "one or more")
        _check(self, "context", 0 <= self.context <= _MOST, "0 (engine.max_len) or more")
        _check(self, "target", 0 <= self.target < math.inf, "0 (any) or more")
        _check(self, "most_chips", 1 <= self.most_chips <= _MOST, "1 or more")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All sections of a run."""

    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    mesh: MeshSection = dataclasses.field(default_factory=MeshSection)
    pool: PoolSection = dataclasses.field(default_factory=PoolSection)
    hosts: HostsSection = dataclasses.field(default_factory=HostsSection)
    engine: EngineSection = dataclasses.field(default_factory=EngineSection)
    compression: CompressionSection = dataclasses.field(default_factory=CompressionSection)
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    job: JobSection = dataclasses.field(default_factory=JobSection)
    scoring: ScoringSection = dataclasses.field(default_factory=ScoringSection)
    cascade: CascadeSection = dataclasses.field(default_factory=CascadeSection)
    bench: BenchSection = dataclasses.field(default_factory=BenchSection)
    calibration: CalibrationSection = dataclasses.field(default_factory=CalibrationSection)
    recovery: RecoverySection = dataclasses.field(default_factory=RecoverySection)
    receipt: ReceiptSection = dataclasses.field(default_factory=ReceiptSection)
    sweep: SweepSection = dataclasses.field(default_factory=SweepSection)
    optimizer: OptimizerSection = dataclasses.field(default_factory=OptimizerSection)
    plan: PlanSection = dataclasses.field(default_factory=PlanSection)
    output: str = _doc("", "new directory that compress writes")

    def require_one_model(self, driver: str) -> None:
        """Raises ValueError where a cascade is asked of a driver that has none."""
        if self.cascade.agreement:
            raise ValueError(f"{driver} works with one model: leave out cascade.agreement")

    @property
    def replicas(self) -> int:
        """Engines that share the rows."""
        return self.mesh.data * max(1, self.pool.ray)

    def require_one_engine(self, driver: str) -> None:
        """Raises ValueError where replicas, hosts or a cascade are asked of a driver that has none
        of them.
        """
        self.require_one_model(driver)
        if self.mesh.data > 1 or self.pool.ray or self.hosts.coordinator:
            raise ValueError(
                f"{driver} works with one engine on one host: leave out mesh.data, pool.ray and "
                "hosts.coordinator"
            )

    def require_no_feedback(self, driver: str) -> None:
        """Raises ValueError where a driver whose engines keep their knobs is asked to set them."""
        asked = self.optimizer
        if asked.log or asked.feedback == "on" or asked.profile not in ("auto", "off"):
            raise ValueError(
                f"{driver} runs the config as it is, without feedback: leave out optimizer.log, "
                "optimizer.profile and optimizer.feedback=on"
            )

    def require_one_process(self, driver: str) -> None:
        """Raises ValueError where other processes are asked of a driver that has only its own."""
        if self.pool.ray or self.hosts.coordinator:
            raise ValueError(
                f"{driver} works in one process: leave out pool.ray and hosts.coordinator"
            )

    def require_one_host(self) -> None:
        """Raises ValueError where hosts are asked of an engine that hasn't met them."""
        for name, value in dataclasses.asdict(self.hosts).items():
            if value != getattr(HostsSection, name):
                raise ValueError(
                    f"hosts.{name}={value!r}: this engine is of one host: leave it out. For "
                    "several give hosts.coordinator to python -m lepton_jax.run on each, or "
                    "LeptonEngine(sync=hosts) the hosts that lepton_jax.distributed.hosts.join"
                    "(config) meets before jax looks for devices"
                )

    def require_no_idle_fields(self) -> None:
        """Raises ValueError where fields of engine or pool are given that others leave unused."""
        engine = self.engine
        for name in ("address", "cpus", "gpus", "tpus"):
            value = getattr(self.pool, name)
            if not self.pool.ray and value != getattr(PoolSection, name):
                raise ValueError(
                    f"pool.{name}={value!r} is of Ray actors, and pool.ray=0 makes none: set it, "
                    f"or leave pool.{name} out"
                )
        decided = self.optimizer.profile not in ("auto", "off")  # a profile may do without a draft
        for name, idle in {"draft_model": "", "draft_preset": "none"}.items():
            value = getattr(engine, name)
            if value != idle and engine.speculation != "draft" and not decided:
                raise ValueError(
                    f"engine.{name}={value!r} is of engine.speculation=draft, and that is "
                    f"{engine.speculation!r}: set it, or leave engine.{name} out"
                )
        if max(engine.prefill_sizes, default=0) > engine.prefill_chunk:
            raise ValueError(
                f"engine.prefill_sizes={engine.prefill_sizes} has more tokens than a program may, "
                f"engine.prefill_chunk={engine.prefill_chunk}: lower the one or raise the other"
            )

    def __post_init__(self):
        _check_types(self)
