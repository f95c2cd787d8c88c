"""LeptonEngine: the face for notebooks and scripts. Load a model, start it, ask it.

    with LeptonEngine() as engine:
        engine.load_model("demo:smollm2", compression="w8a8").start()
        print(engine.generate(["The capital of France is"])[0].text)

It only joins the rooms below: `checkpoints` and `compression` give leaves, `engine` runs them,
`jobs/session.py` turns prompts into answers. Files of rows are `lepton_jax/run.py`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

import jax

from lepton_jax import compile_cache
from lepton_jax.checkpoints import load as checkpoints
from lepton_jax.compression.presets import compressor
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import ModelSection, RunConfig, SamplingParams
from lepton_jax.engine.loop import Engine
from lepton_jax.jobs.rows import Prompt
from lepton_jax.jobs.session import Completion, Delta, Session
from lepton_jax.text import tokenizer as tokenizers


class LeptonEngine:
    """A model that answers prompts on this machine's device.

    Attributes:
      tokenizer: after `load_model`.
      loaded: after `load_model`, the weights and what is known of them.
      engine: after `start`, the engine of token ids below.
    """

    def __init__(self):
        self.tokenizer: tokenizers.Tokenizer | None = None
        self.engine: Engine | None = None
        self.loaded: checkpoints.Loaded | None = None
        self._config = RunConfig()
        self._numbers = itertools.count()

    def __enter__(self) -> "LeptonEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def fingerprint(self) -> str:
        return self._need_model().fingerprint

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
          dtype: "auto", "float32" or "bfloat16".
          compression: preset "none", "int8", "w8a8", "int4" or "fp8", instead of the config's.
          config: all settings at once; the arguments above go before it where they are given.
          progress: called with (done bytes, total bytes, parameter) after each parameter.

        Returns self. Raises ValueError (CheckpointError, TokenizerError) naming what is wrong and
        where.
        """
        self.stop()
        self._config = config or RunConfig()
        section = self._config.model
        section = ModelSection(
            path=str(path) or section.path,
            dtype=dtype or section.dtype,
            tokenizer=section.tokenizer,
        )
        asked = self._config.compression
        recipe = Recipe.of(preset=compression) if compression else Recipe.from_config(asked)
        recipe.require_no_calibration(section.path)
        compile_cache.enable()
        # On a CPU bfloat16 is for weights: arithmetic between the products is faster in float32.
        activations = "float32" if jax.default_backend() == "cpu" else None
        options = dict(dtype=section.dtype, activation_dtype=activations)
        compress = None
        if recipe.rules:
            specs = checkpoints.describe(section.path, **options).specs
            compress = compressor(recipe.rules, specs)
        self.loaded = checkpoints.load(
            section.path, **options, compress=compress, progress=progress
        )
        self.tokenizer = tokenizers.load(section.tokenizer or self.loaded.tokenizer_source)
        return self

    def start(
        self, *, workload: Sequence[tuple[int, SamplingParams]] = (), strict: bool = False
    ) -> "LeptonEngine":
        """Plans memory, and compiles where the coming requests are known.

        Args:
          workload: (prompt tokens, params) of the coming requests: the cache is cut to it and its
          programs are
            compiled now. Without it programs are compiled as they are first needed.
          strict: a program missing from the warm-up is an error instead of a warning.

        Returns self.
        """
        loaded = self._need_model()
        self.engine = Engine(
            loaded.model,
            loaded.leaves,
            section=self._config.engine,
            eos_ids=self.tokenizer.eos_ids,
            workload=workload,
            strict=strict,
        )
        if workload:
            self.engine.warm_up(workload)
        return self

    def stop(self) -> None:
        """Gives device memory back: the cache and the weights."""
        self.engine = self.loaded = self.tokenizer = None

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Answers in the order of the prompts.

        Args:
          prompts: texts, lists of messages, or lists of token ids; or a single one of these.
          params: for all of them; by default those of the config.

        Raises ValueError (RowError) on a prompt that can't be served.
        """
        answers: dict[str, Completion] = {}
        with closing(self._session()) as session:
            keys = self._add(session, prompts, params)
            for delta in session.deltas():
                if delta.completion is not None:
                    answers[delta.key] = delta.completion
        return [answers[key] for key in keys]

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> Iterator[tuple[int, Delta]]:
        """Pieces as they come: (index of the prompt, Delta with `.text` and `.finish_reason`)."""
        with closing(self._session()) as session:
            index = {key: i for i, key in enumerate(self._add(session, prompts, params))}
            for delta in session.deltas():
                yield index[delta.key], delta

    def _session(self) -> Session:
        self._need_model()
        if self.engine is None:
            self.start()
        return Session(self.engine, self.tokenizer)

    def _add(self, session: Session, prompts, params: SamplingParams | None) -> list[str]:
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], (int, Mapping))):
            prompts = [prompts]
        keys = [f"prompt-{next(self._numbers)}" for _ in prompts]
        for key, prompt in zip(keys, prompts, strict=True):
            session.add(key, prompt, params or self._config.sampling)
        return keys

    def _need_model(self) -> checkpoints.Loaded:
        if self.loaded is None:
            raise RuntimeError("no model is loaded: call load_model(path) first")
        return self.loaded
