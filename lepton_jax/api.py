"""LeptonEngine: the face for notebooks and scripts. Load a model, start it, ask it.

    with LeptonEngine() as engine:
        engine.load_model("demo:smollm2", compression="w8a8").start()
        print(engine.generate(["The capital of France is"])[0].text)
        print(engine.predict(["Lovely soup!"], ["good", "bad"]))

It only joins the rooms below: `checkpoints` and `compression` give leaves, `engine` runs them,
`jobs/session.py` turns prompts into answers. Files of rows are `lepton_jax/run.py`.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax import compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.compression import receipt as receipts
from lepton_jax.compression.load import load_compressed
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    PoolSection,
    RunConfig,
    ScoringSection,
)
from lepton_jax.distributed.local import device_groups, local_engines, local_pool, pool_of
from lepton_jax.distributed.pool import Pool
from lepton_jax.distributed.ray_replicas import RayActors, platform_of
from lepton_jax.engine.cascade import CascadeEngine
from lepton_jax.engine.loop import Engine, Workload
from lepton_jax.engine.protocol import Sync, TokenEngine, needs_head
from lepton_jax.jobs.cascade import (
    CascadeMode,
    check_cascade,
    dense_config,
    half_of_the_cache,
)
from lepton_jax.jobs.classify import ClassifyMode, classify_fields
from lepton_jax.jobs.compress import CompressJob
from lepton_jax.jobs.compress_inputs import load_tokenizer
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.mode_for import refuse_unread
from lepton_jax.jobs.modes import Mode
from lepton_jax.jobs.perplexity import PerplexityMode
from lepton_jax.jobs.promise import Promise
from lepton_jax.jobs.rank import RankMode
from lepton_jax.jobs.row_bar import RowBar
from lepton_jax.jobs.rows import Prompts, each_prompt
from lepton_jax.jobs.score import ScoreMode, score_fields
from lepton_jax.jobs.scoring import ChoosingMode, score_all
from lepton_jax.jobs.session import (
    Completion,
    Delta,
    OneAsker,
    Params,
    Session,
    params_of_each,
)
from lepton_jax.optimizer.costs import Costs, assumed, settled
from lepton_jax.optimizer.feedback import Feedbacks, listen_to
from lepton_jax.optimizer.profile import Profile, require_profile
from lepton_jax.sharding import Placement
from lepton_jax.sharding.partition import uneven_costs
from lepton_jax.text import tokenizer as tokenizers

log = logging.getLogger(__name__)

_PROBE = "Tokenizers differ: naïve 12345 + 678;\n\tdef f(x): return x  # 日本 \U0001f642"


class LeptonEngine:
    """A model that answers prompts on this machine's devices.

    Attributes:
      tokenizer: after `load_model`.
      loaded: after `load_model`, the weights and what is known of them.
      receipt: after `load_model`, what compression cost, where the model has a receipt.
      engine: after `start`, the engine of token ids below, or a pool of replicas of it, or with
        `cascade.agreement` both models' engines.
      promise: after `score`, `predict` or `rank` with `cascade.agreement`, how it was kept
        (`promise.account()`), over all such calls that asked in the same way.
      feedback: after `start`, what sets the knobs of the engines in this process while they run,
        and why; in a cascade those of the compressed model.
    """

    def __init__(self, sync: Sync | None = None):
        """`sync`: of the hosts that run the same program: what `distributed.hosts.join` gives."""
        self._sync = sync
        self.tokenizer: tokenizers.Tokenizer | None = None
        self.engine: Engine | Pool | CascadeEngine | None = None
        self.promise: Promise | None = None
        self._dense: LeptonEngine | None = None
        self._open: Session | None = None  # the last one
        self._asker = OneAsker()
        self._modes: dict[tuple[str, ScoringSection], CascadeMode] = {}
        self._actors: RayActors | None = None
        self.loaded: checkpoints.Loaded | None = None
        self.receipt: receipts.Receipt | None = None
        self.feedback: Feedbacks | None = None
        self._config = RunConfig()
        self._numbers = itertools.count()

    def __enter__(self) -> "LeptonEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def config(self) -> RunConfig:
        """All settings, with what `load_model` was given."""
        return self._config

    @property
    def fingerprint(self) -> str:
        """Of all that answers depend on in the weights."""
        mine = self._need_model().fingerprint
        return f"{mine}+{self._dense.fingerprint}" if self._dense else mine

    def load_model(
        self,
        path: str | Path = "",
        *,
        dtype: str = "",
        compression: str = "",
        config: RunConfig | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> "LeptonEngine":
        """Reads weights, compressing each as it arrives, and the tokenizer.

        Args:
          path: Hugging Face directory, `.gguf` file, our Orbax directory, `hf:org/name` or
          `demo:smollm2`.
          dtype: "auto", "float32", "bfloat16" or "float16".
          compression: preset "none", "int8", "int8_g32", "w8a8", "int4" or "fp8", instead of the
            config's.
          config: all settings at once; the arguments above go before it where they are given.
          progress: called with (done bytes, total bytes, parameter) after each parameter.

        Returns self. Raises ValueError (CheckpointError, TokenizerError) naming what is wrong and
        where; then nothing is loaded.
        """
        self.stop()
        config = config or RunConfig()
        section = dataclasses.replace(
            config.model, path=str(path) or config.model.path, dtype=dtype or config.model.dtype
        )
        asked = CompressionSection(preset=compression) if compression else config.compression
        self._config = dataclasses.replace(config, model=section, compression=asked)
        try:
            self._read(progress)
        except BaseException:
            self.stop()
            raise
        return self

    def _read(self, progress: Callable[[int, int, str], None] | None) -> None:
        """Loads what the config asks for."""
        config, section = self._config, self._config.model
        config.require_no_idle_fields()
        if self._sync is None:
            config.require_one_host()
        recipe = Recipe.from_config(config.compression)
        recipe.require_no_calibration(section.path)
        if config.cascade.agreement:
            check_cascade(config)
        if config.pool.ray:
            if config.optimizer.log:
                raise ValueError(
                    "optimizer.log is of an engine in this process, and with pool.ray there is "
                    "none: leave one of them out"
                )
            self._load_actors(dataclasses.replace(config, pool=PoolSection()))
            return
        devices = device_groups(config.mesh)[0]
        compile_cache.enable()
        self.loaded = load_compressed(section, recipe, progress=progress, devices=devices)
        model = self.loaded.model
        for cost in uneven_costs(model.specs, Placement(devices).axis, model.heads):
            log.warning("%s", cost)
        self.receipt = receipts.of_loaded(section.path, self.loaded.fingerprint)
        self.tokenizer = tokenizers.load(section.tokenizer or self.loaded.tokenizer_source)
        self.tokenizer.set_chat_variables(section.chat_variables)
        if config.cascade.agreement:
            dense = dense_config(config)
            self._dense = LeptonEngine(self._sync).load_model(config=dense, progress=progress)
            if config.cascade.model:
                self._check_tokenizer(self._dense.tokenizer, "cascade.model", dense.model.path)

    def start(
        self,
        *,
        workload: Workload = (),
        strict: bool = False,
        profile: Profile | None = None,
    ) -> "LeptonEngine":
        """Plans memory, and compiles where the coming requests are known.

        Args:
          workload: (prompt tokens, params) of the coming requests: the cache is cut to it and its
            programs are compiled from now on, in the background. Without it programs are compiled
            as they are first needed, and on a CPU the cache takes 1/64 of the memory, or one row.
          strict: a program that the workload can't reach is an error instead of a warning.
          profile: of the config: feedback begins with its knobs and reckons with its costs.

        Returns self. Raises ValueError where the memory is too small, or an output head is missing
        that the workload needs; then nothing is started.
        """
        self._need_idle()
        config = self._config
        if any(needs_head(asked) for _, asked in workload):
            self.loaded.config.require_head(config.model.path)
        require_profile(config, profile)
        if strict and not workload:
            raise ValueError(
                "strict=True refuses what a workload can't reach, and none is given: give "
                "workload=[(prompt tokens, SamplingParams), ...], or leave strict out"
            )
        if self._actors is not None:
            slots = config.engine.rows * config.mesh.data
            replicas = self._actors.start(workload, slots=slots, strict=strict, profile=profile)
            self.engine = pool_of(replicas, config)
            return self
        self._close_engine()  # its memory goes before the new one's is planned
        costs = profile.costs if profile else assumed(jax.default_backend())
        knobs = profile.knobs if profile else {}
        models = [self, self._dense] if self._dense else [self]
        asked = dict(workload=workload, strict=strict)
        planned = [model._plan(costs, **asked) for model in models]  # before a cache is there
        pairs = list(zip(models, planned, strict=True))
        feedbacks = [
            listen_to(engines, model.config.optimizer, costs=costs, knobs=knobs)
            for model, engines in pairs
        ]
        for engine in itertools.chain(*planned) if workload else ():
            engine.warm_up(workload, wait=False)
        served = [model._joined(engines) for model, engines in pairs]
        self.feedback = feedbacks[0]
        self.engine = CascadeEngine(*served) if self._dense else served[0]
        return self

    def _plan(self, costs: Costs, **asked: Any) -> list[Engine]:
        """An engine for each replica, without its cache; `asked` are arguments of `Engine`."""
        section = settled(self._config, costs)
        if self._dense:
            section = half_of_the_cache(section)
        return local_engines(
            self.loaded,
            section,
            mesh=self._config.mesh,
            tokenizer=self.tokenizer,
            draft=self._read_draft(section) if section.speculation == "draft" else None,
            sync=self._sync,
            **asked,
        )

    def _joined(self, engines: Sequence[Engine]) -> TokenEngine:
        """Replicas as one."""
        return engines[0] if len(engines) == 1 else local_pool(engines, self._config)

    def _read_draft(self, section: EngineSection) -> checkpoints.Loaded:
        """The draft model. Raises ValueError where it has another tokenizer."""
        asked = self._config.model
        if section.draft_model:
            asked = dataclasses.replace(asked, path=section.draft_model)
        loaded = load_compressed(asked, Recipe.of(preset=section.draft_preset))
        if section.draft_model:
            other = tokenizers.load(asked.tokenizer or loaded.tokenizer_source)
            self._check_tokenizer(other, "engine.draft_model", asked.path)
        return loaded

    def _check_tokenizer(self, other: tokenizers.Tokenizer, field: str, path: str) -> None:
        """Raises ValueError where the model that a field names has another tokenizer."""
        if other.encode(_PROBE) != self.tokenizer.encode(_PROBE):
            raise ValueError(
                f"{field}={path!r} cuts text into other tokens than the model: want a model of the "
                "same tokenizer"
            )

    def stop(self) -> None:
        """Gives device memory back: the cache and the weights. An open stream ends."""
        self._close_engine()
        if self._actors is not None:
            self._actors.close()
        if self._dense is not None:
            self._dense.stop()
        self._modes.clear()
        self._actors = self._dense = self.promise = None
        self.loaded = self.tokenizer = self.receipt = None

    def _close_engine(self) -> None:
        """Gives the memory of caches back, in a cascade of both models'."""
        if self._open is not None:
            self._open.close()
        if self.engine is not None and self._actors is None:
            self.engine.close()
        self.engine = self.feedback = self._open = None

    def generate(
        self,
        prompts: Prompts,
        params: Params | None = None,
        *,
        tools: Sequence[Mapping] = (),
        progress: bool = False,
    ) -> list[Completion]:
        """Answers in the order of the prompts.

        Args:
          prompts: texts, lists of messages, or lists of token ids; or a single one of these.
          params: for all of them, or one for each; by default those of the config.
          tools: JSON schemas of functions that all prompts, then messages, offer the model.
          progress: show a bar of rows meanwhile, with their ETA and tokens/s.

        Raises ValueError (RowError) on a prompt that can't be served.
        """
        answers: dict[str, Completion] = {}
        with self._asker, closing(self._session()) as session:
            keys = self._add(session, prompts, params, tools)
            with RowBar(len(keys), shown=progress) as bar:
                for delta in session.deltas():
                    bar.add_beat(delta.new_tokens)
                    if delta.completion is not None:
                        answers[delta.key] = delta.completion
                        bar.add_row()
        return [answers[key] for key in keys]

    def stream(
        self, prompts: Prompts, params: Params | None = None, *, tools: Sequence[Mapping] = ()
    ) -> Iterator[tuple[int, Delta]]:
        """Pieces as they come: (index of the prompt, Delta with `.text` and `.finish_reason`).

        Asked as `generate` is. Until it is exhausted or closed nothing else can be asked.
        """
        with self._asker:
            session = self._session()
        with closing(session):
            with self._asker:
                index = {key: i for i, key in enumerate(self._add(session, prompts, params, tools))}
            while session.has_work:
                with self._asker:
                    deltas = session.step()
                for delta in deltas:
                    yield index[delta.key], delta

    def score(
        self,
        items: str | Mapping | Sequence[str | tuple[str, str] | Mapping],
        *,
        progress: bool = False,
    ) -> list[dict]:
        """How likely the model finds given texts: output rows of the mode score (`jobs/score.py`).

        Args:
          items: texts, (context, continuation), or mappings such as {"context", "choices"}; or a
            single one of these.
          progress: as in `generate`.
        """
        mode = self._chooses("score", self._config.scoring)
        pair = isinstance(items, tuple) and len(items) == 2 and isinstance(items[0], str)
        works = [mode.parse(score_fields(item)) for item in ([items] if pair else _listed(items))]
        return self._score_all(mode, works, progress=progress)

    def predict(
        self,
        texts: Prompts,
        labels: Sequence[str] | None = None,
        *,
        template: str | None = None,
        chat: bool | None = None,
        system: str | None = None,
        calibrate: bool | None = None,
        normalize: str | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Probabilities of labels, float64 `[B, labels]`; each row adds up to 1.

        Args:
          texts: to classify, or with `chat` lists of messages; or a single one of these.
          labels: to choose from; by default, as with all that follows, those of the config.
          template, chat, system, calibrate, normalize: as in `config.ScoringSection`.
          progress: as in `generate`.
        """
        section = self._scoring(
            "classify",
            labels=None if labels is None else _listed(labels),
            template=template,
            chat=chat,
            system=system,
            calibrate=calibrate,
            normalize=normalize,
        )
        mode = self._chooses("classify", section)
        works = [mode.parse(classify_fields(text)) for text in each_prompt(texts)]
        rows = self._score_all(mode, works, progress=progress)
        found = np.array([list(row["probabilities"].values()) for row in rows])
        return found.reshape(len(rows), len(section.labels))

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        pooling: str | None = None,
        layer: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Vectors of length 1, float32 `[B, D]`: hidden states.

        Args:
          texts: one vector each; or a single text.
          pooling: "last" token or "mean" of all; by default the config's.
          layer: after how many layers, 0 the embeddings; -1 after the final norm; by default the
            config's.
          progress: as in `generate`.
        """
        section = self._scoring("embed", pooling=pooling, layer=layer)
        mode = EmbedMode(section.pooling, section.layer)
        works = [mode.parse({"text": text}) for text in _listed(texts)]
        rows = self._score_all(mode, works, progress=progress)
        found = np.array([row["embedding"] for row in rows], np.float32)
        return found.reshape(len(rows), self.loaded.config.hidden_size)

    def rank(
        self,
        query: str,
        candidates: Sequence[str],
        *,
        rank_by: str | None = None,
        template: str | None = None,
        normalize: str | None = None,
        pooling: str | None = None,
        layer: int | None = None,
    ) -> list[tuple[int, float]]:
        """(index, score) of the candidates, the best first.

        Args:
          query: what they shall fit.
          candidates: two or more texts.
          rank_by, template, normalize, pooling, layer: as in `config.ScoringSection`; by default
            the config's.
        """
        section = self._scoring(
            "rank",
            rank_by=rank_by,
            template=template,
            normalize=normalize,
            pooling=pooling,
            layer=layer,
        )
        mode = self._chooses("rank", section)
        work = mode.parse({"query": query, "candidates": _listed(candidates)})
        (row,) = self._score_all(mode, [work])
        return [(int(index), float(row["scores"][index])) for index in row["ranking"]]

    def perplexity(
        self, text: str, *, window: int | None = None, stride: int | None = None
    ) -> float:
        """exp of the mean loss a token over a text of any length, by sliding windows.

        Args:
          text: to foresee.
          window: tokens of a window; by default the config's.
          stride: tokens from one window to the next; by default the config's.
        """
        section = self._scoring("perplexity", window=window, stride=stride)
        mode = PerplexityMode(section.window, section.stride)
        (row,) = self._score_all(mode, [mode.parse({"text": text})])
        return row["perplexity"]

    def _load_actors(self, config: RunConfig) -> None:
        """Loads the model in Ray actors; here are its tokenizer and what is known of it."""
        path, platform = config.model.path, platform_of(self._config.pool)
        dtypes = checkpoints.dtypes_here(config.model.dtype, platform)
        model = checkpoints.describe(path, platform=platform, **dtypes)
        source = checkpoints.tokenizer_source(path)
        self.tokenizer = load_tokenizer(config)
        self._actors = RayActors(self._config.pool, functools.partial(_load, config))
        self.loaded = checkpoints.Loaded(
            config=model.config,
            model=model,
            leaves=(),
            tokenizer_source=source,
            fingerprint=self._actors.fingerprint,
            bytes=self._actors.bytes,
        )
        self.receipt = receipts.of_loaded(path, self.loaded.fingerprint)

    def _scoring(self, mode: str, **fields) -> ScoringSection:
        """The config's section with the fields that are given: None is not. Raises ValueError
        where the mode wouldn't read one of them.
        """
        given = {name: value for name, value in fields.items() if value is not None}
        section = dataclasses.replace(self._config.scoring, **given)
        refuse_unread(mode, section, given)
        return section

    def _chooses(self, kind: str, section: ScoringSection) -> ChoosingMode | CascadeMode:
        """A mode; in a cascade that of both models, which is kept for what it has learned."""
        make: Callable[[], ChoosingMode] = {
            "score": lambda: ScoreMode(choices_only=bool(self._dense)),
            "classify": lambda: ClassifyMode(section),
            "rank": lambda: RankMode(section),
        }[kind]
        if not self._dense:
            return make()
        if (kind, section) not in self._modes:
            self._modes[kind, section] = CascadeMode.of(make, self._config)
        mode = self._modes[kind, section]
        self.promise = mode.promise
        return mode

    def _score_all(self, mode: Mode, works: Sequence, *, progress: bool = False) -> list[dict]:
        keyed = {f"row-{next(self._numbers)}": work for work in works}
        with self._asker:
            return score_all(mode, keyed, *self._started(), progress=progress)

    def _started(self) -> tuple[TokenEngine, tokenizers.Tokenizer]:
        self._need_idle()
        if self.engine is None:
            self.start()
        return self.engine, self.tokenizer

    def _session(self) -> Session:
        self._open = Session(*self._started())
        return self._open

    def _add(self, session: Session, prompts, params: Params | None, tools) -> list[str]:
        prompts = each_prompt(prompts)
        each = params_of_each(len(prompts), self._config.sampling if params is None else params)
        keys = [f"prompt-{next(self._numbers)}" for _ in prompts]
        for key, prompt, asked in zip(keys, prompts, each, strict=True):
            session.add(key, prompt, asked, tools=tools or None)
        return keys

    def _need_idle(self) -> None:
        """Raises RuntimeError where what is asked would take an open stream's tokens."""
        self._need_model()
        if self._open is not None and self._open.has_work:
            raise RuntimeError("a stream is open: exhaust or close it first")

    def _need_model(self) -> checkpoints.Loaded:
        if self.loaded is None:
            raise RuntimeError("no model is loaded: call load_model(path) first")
        return self.loaded


def _load(config: RunConfig, share: float) -> LeptonEngine:
    """What an actor does first; it may take this share of its machine's memory for caches."""
    engine = dataclasses.replace(config.engine, cache_share=share * config.engine.cache_share)
    return LeptonEngine().load_model(config=dataclasses.replace(config, engine=engine))


def _listed(items: Any) -> list:
    """Several, or a single text or mapping, as a list."""
    return [items] if isinstance(items, (str, Mapping)) else list(items)


def compress(
    path: str | Path,
    output: str | Path,
    *,
    preset: str = "",
    rules: str | Sequence[str] = (),
    config: RunConfig | None = None,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> receipts.Receipt:
    """Compresses a model into a new directory and measures what that cost.

    Args:
      path: of the model, as for `LeptonEngine.load_model`; the result loads in the same way.
      output: directory to write, whole or not at all.
      preset: "int8", "int8_g32", "w8a8", "int4" or "fp8".
      rules: texts such as "embed|head -> weights=int8" instead (compression/recipe.py); or one.
      config: all settings at once; the arguments above go before it where they are given.
      progress: called with (stage, done, total, what).

    Returns what receipt.json holds. Raises ValueError naming what is wrong and where.
    """
    config = config or RunConfig()
    changes: dict = {"output": str(output)}
    if path:
        changes["model"] = dataclasses.replace(config.model, path=str(path))
    if preset or rules:
        changes["compression"] = dataclasses.replace(
            config.compression, preset=preset or "none", rules=_listed(rules)
        )
    job = CompressJob(dataclasses.replace(config, **changes))
    return job.run(progress) if progress else job.run()
