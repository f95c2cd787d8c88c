"""lm-evaluation-harness on our engine: the model `lepton_jax` (extra `eval`).

    python -m lepton_jax.evaluation --model lepton_jax --model_args path=demo:smollm2 \
        --tasks my_task --include_path folder_with_the_task

`model_args` may also have fields of a config's sections, as in `path=...,mesh.model=4`.
This is lm_eval's own command line with our model known to it. The entry point `lm_eval.models`
names it too, but the `lm_eval` command of lm-eval 0.4.13 doesn't look for entry points. Requests
are sent all at once: the engine makes its own batches, and contexts that begin alike are computed
once. Read next: `jobs/pairs.py`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lepton_jax.api import LeptonEngine
from lepton_jax.checkpoints.loaded import digest
from lepton_jax.config import (
    CompressionSection,
    EngineSection,
    ModelSection,
    RunConfig,
    SamplingParams,
    refuse_unknown,
)
from lepton_jax.engine.scored import Scored
from lepton_jax.jobs.generate import GenerateSession, PromptWork
from lepton_jax.jobs.pairs import Pair, Questions, prefix_ids
from lepton_jax.jobs.scoring import Asked, ScoringMode, answer_all, score_all
from lepton_jax.jobs.session import Session
from lepton_jax.optimizer.space import with_fields
from lepton_jax.text.tokenizer import Tokenizer

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(
        'lepton_jax.evaluation needs lm-eval: pip install "lepton_jax[eval]"'
    ) from error

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_MOST_NEW = 256  # tokens of an answer where a task doesn't say; lm_eval's own default
_OF_OTHERS = ("batch_size", "device")
_SECTIONS = ("model", "mesh", "pool", "engine", "compression")  # that scoring and answers depend on
_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "seed")


@register_model("lepton_jax")
class LeptonLM(TemplateLM):
    """A model for lm_eval. Pairs are tokenized by lm_eval's `TemplateLM`."""

    def __init__(
        self,
        path: str,
        dtype: str = "auto",
        compression: str = "none",
        *,
        rows: int = 32,
        max_length: int = 0,
        **of_others: Any,
    ):
        """Loads the model.

        Args:
          path: as `model.path` of a config.
          dtype: of the weights; float32 gives the numbers of lm_eval's own float32 backends.
          compression: preset "none", "int8", ...
          rows: requests that are decoded at once.
          max_length: most tokens of context and answer; 0: `engine.max_len`'s rule.
          of_others: "SECTION.FIELD" of a config, such as "mesh.model", which goes before those
            above; and batch_size and device, which lm_eval's command always gives, also where
            nobody asked: the engine makes its own batches, and jax knows the device (JAX_PLATFORMS
            chooses another).
        """
        super().__init__()
        config = RunConfig(
            model=ModelSection(path=path, dtype=dtype),
            engine=EngineSection(rows=rows, max_len=max_length),
            compression=CompressionSection(preset=_text(compression)),
        )
        config = _with_settings(config, of_others)
        self.lepton = LeptonEngine().load_model(config=config).start()
        self.tokenizer = self.lepton.tokenizer
        self._numbers = itertools.count()

    @property
    def max_length(self) -> int:
        """Tokens of a context and its continuation."""
        return self.lepton.engine.max_len

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        return prefix_ids(self.tokenizer)[0]

    @property
    def tokenizer_name(self) -> str:
        """Names lm_eval's cache of requests, by all that prompts come of."""
        model = self.lepton.config.model
        prompts = digest([model.tokenizer, dict(model.chat_variables)])
        return f"lepton_jax_{self.lepton.fingerprint}_{prompts}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template as a text. There is one, so its name can't be chosen."""
        if isinstance(chat_template, str):
            raise ValueError(
                f"chat template {chat_template!r} can't be chosen: say --apply_chat_template"
            )
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        """Ids of a text, by default with those that the model wants around it, each once.

        Raises ValueError on options that are lm_eval's for other tokenizers.
        """
        refuse_unknown(unused, (), where="tok_encode")
        return self.tokenizer.encode(string, add_special=add_special_tokens is not False)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of `max_length` without overlap."""
        windows = [self._windows(request.args[0]) for request in requests]
        asked = [(("", ""), *window) for found in windows for window in found]
        found = iter(self._loglikelihood_tokens(asked, disable_tqdm=disable_tqdm))
        totals = [sum(next(found)[0] for _ in own) for own in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to its first stop text.

        Raises ValueError (RowError) where a request can't be served or the model fails.
        """
        works = {f"eval-{next(self._numbers)}": self._work(*request.args) for request in requests}
        session = GenerateSession(Session(self.lepton.engine, self.tokenizer))
        shown = not disable_tqdm
        rows = answer_all(session, works, observe=lambda row: None, progress=shown)
        answers = [row["text"] for row in rows]
        for request, text in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _work(self, context: str, options: Mapping[str, Any]) -> PromptWork:
        """A prompt cut at its beginning to what fits, and what a task asks of its answer."""
        params = _sampling(options)
        room = self.max_length - params.max_tokens
        if room < 1:
            raise ValueError(
                f"{params.max_tokens} new tokens leave no room in max_length={self.max_length}"
            )
        return PromptWork(self.tok_encode(context)[-room:], params)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each continuation."""
        groups: dict[str, list[Pair]] = {}
        pairs = [self._pair(context, rest) for _, context, rest in requests]
        for _, group in itertools.groupby(pairs, lambda pair: pair.context):
            groups[f"eval-{next(self._numbers)}"] = list(group)
        asked = self.lepton.engine, self.tokenizer
        rows = score_all(_PairsMode(), groups, *asked, progress=not disable_tqdm)
        found = [(one.logprob, one.greedy) for row in rows for one in row["likelihoods"]]
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts != ("", ""):
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _pair(self, context: list[int], continuation: list[int]) -> Pair:
        """A pair that fits, its context cut at its beginning as lm_eval's own backends do it."""
        if not continuation:
            raise ValueError("a continuation has no tokens of its own: want a longer text")
        room = self.max_length + 1 - len(continuation)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(continuation)} tokens, more than max_length="
                f"{self.max_length}: raise max_length"
            )
        return Pair(tuple(context[-room:]), tuple(continuation), bytes=1)

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [make_disjoint_window(window) for window in windows]


class _PairsMode(ScoringMode):
    """Pairs of ids that have one context."""

    fields = ()

    def parse(self, values: Mapping[str, Any]) -> list[Pair]:
        raise TypeError("pairs come from lm_eval, not from the rows of a file")

    def ask(self, work: list[Pair], tokenizer: Tokenizer) -> Asked:
        asked = Questions(work)

        def answer(results: list[Scored]) -> dict:
            return {"likelihoods": asked.likelihoods(results)}

        return Asked(asked.questions, answer)


def _with_settings(config: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """A config with the fields that are given as "section.field". Raises ValueError on an unknown
    name or an impossible value.
    """
    settings = {name: value for name, value in given.items() if "." in name}
    refuse_unknown(given.keys() - settings, (*_OF_OTHERS, "SECTION.FIELD"), where="model_args")
    for name in settings:
        section, _, field = name.partition(".")
        refuse_unknown([section], _SECTIONS, where="model_args: section")
        known = [one.name for one in dataclasses.fields(getattr(config, section))]
        refuse_unknown([field], known, where=f"model_args: {section}")
    return with_fields(config, {name: _text(value) for name, value in settings.items()})


def _text(value: Any) -> Any:
    """lm_eval reads the word none as None, which is no setting's value."""
    return "none" if value is None else value


def _sampling(options: Mapping[str, Any]) -> SamplingParams:
    """What a task's generation_kwargs mean. Raises ValueError on one that isn't known."""
    refuse_unknown(options, ("until", "do_sample", *_LIMITS, *_SAMPLED), where="generation_kwargs")
    until = options.get("until") or ()
    most = next((options[name] for name in _LIMITS if options.get(name)), _MOST_NEW)
    params = SamplingParams(max_tokens=int(most), stop=until)
    temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
    if not options.get("do_sample", temperature > 0):
        return params
    drawn = {name: options[name] for name in _SAMPLED if name in options}
    return dataclasses.replace(params, **drawn | {"temperature": float(temperature)})


if __name__ == "__main__":
    sys.exit(cli_evaluate())
