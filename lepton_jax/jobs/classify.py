"""The mode classify: which of some labels fits a text, as probabilities.

    {"id": "a", "text": "The parcel came broken and nobody answers."}
    {"id": "b", "messages": [{"role": "user", "content": "Where is my parcel?"}]}

The config's `scoring.template` says how text and label stand to each other. The score of a label is
the log-likelihood of its tokens after the template's text: their sum, which is the model's own
probability of the label, or their mean, which doesn't favour short labels. Softmax over the labels
gives probabilities that add up to 1. With `scoring.calibrate` each label's score first loses what
the label gets with a content-free text (Zhao et al. 2021, "Calibrate Before Use"). With
`scoring.chat` the label is the model's answer in a chat: to the template, or to a row's own
"messages", to which template and `scoring.system` add nothing.

An output row is {"id", "label", "probability", "probabilities": {label: p}, "logprobs": {label:
log-likelihood}, "prompt_tokens"}, with "alert": true or false where `scoring.alert` asks
(`alerts.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lepton_jax.config import ScoringSection
from lepton_jax.config_fields import A_LIST
from lepton_jax.engine.scored import Scored, ScoreSpec
from lepton_jax.jobs.alerts import parse_alert
from lepton_jax.jobs.pairs import Likelihood, Questions, chat_pair, split_pair
from lepton_jax.jobs.rows import ASIDE, RowError, need_messages
from lepton_jax.jobs.scoring import (
    Asked,
    ChoosingMode,
    Engine,
    ScoringSession,
    answer_all,
    margin,
    need_text,
)
from lepton_jax.text.tokenizer import Tokenizer

CONTENT_FREE = ("N/A", "[MASK]", "")  # as in the paper; their probabilities are averaged


class ClassifyMode(ChoosingMode):
    """Rows as above; labels and template are the config's."""

    fields = ("text", "messages")

    def __init__(self, section: ScoringSection):
        """Raises ValueError where the section names no labels or its template has no place for
        text and label.
        """
        if len(section.labels) < 2 or len(set(section.labels)) < len(section.labels):
            raise ValueError(
                f"scoring.labels={section.labels!r}: want two or more, all different: {A_LIST}"
            )
        self._section = section
        self._before, self._after = _split_template(section)
        self._alert = parse_alert(section.alert, section.labels)
        self._bias = np.zeros(len(section.labels))
        self._content_free: list[np.ndarray] | None = None  # what is measured for the bias

    def parse(self, values: Mapping[str, Any]) -> str | list[dict]:
        """A text, or the messages of a chat. Raises RowError (invalid_row)."""
        if "messages" not in values:
            return need_text(values, "text", empty=True)
        aside = ASIDE.format("messages")
        if "text" in values:
            raise RowError("invalid_row", f"the row has text and messages: want one{aside}")
        if not self._section.chat or self._section.calibrate:
            wanted = "scoring.calibrate=false" if self._section.chat else "scoring.chat=true"
            raise RowError("invalid_row", f"the row has messages, which want {wanted}{aside}")
        return need_messages(values)

    def ask(self, work: str | list[dict], tokenizer: Tokenizer) -> Asked:
        asked = Questions(self._pairs(work, tokenizer))

        def answer(results: list[Scored]) -> dict:
            found = asked.likelihoods(results)
            labels, logs = self._section.labels, self._log_probabilities(found)
            if self._content_free is not None:
                self._content_free.append(logs)
            chances = np.exp(logs)
            best = int(np.argmax(chances))
            named = dict(zip(labels, chances.tolist(), strict=True))
            alert = {}
            if self._alert:
                label, least = self._alert
                alert["alert"] = named[label] >= least
            return {
                "label": labels[best],
                "probability": float(chances[best]),
                **alert,
                "probabilities": named,
                "logprobs": {label: one.logprob for label, one in zip(labels, found, strict=True)},
                "prompt_tokens": asked.tokens,
            }

        return Asked(asked.questions, answer)

    def choose(self, answer: Mapping[str, Any]) -> tuple[int, float]:
        """The margin is one of log-probabilities."""
        chances = np.array(list(answer["probabilities"].values()))
        with np.errstate(divide="ignore"):
            return int(np.argmax(chances)), margin(np.log(chances))

    def requests(self, work: str | list[dict], tokenizer: Tokenizer) -> list[tuple[int, ScoreSpec]]:
        """Those of the content-free texts too, where `open` will ask them."""
        texts = (work, *CONTENT_FREE) if self._section.calibrate else (work,)
        of_one = super().requests
        return [request for text in texts for request in of_one(text, tokenizer)]

    def open(self, engine: Engine, tokenizer: Tokenizer, *, exact: bool = False) -> ScoringSession:
        """Measures the content-free texts first, where the section asks for calibration."""
        self._calibrate(engine, tokenizer)
        return super().open(engine, tokenizer, exact=exact)

    def _calibrate(self, engine: Engine, tokenizer: Tokenizer) -> None:
        """Sets what each label loses; nothing where the section doesn't ask for it."""
        self._bias = np.zeros(len(self._section.labels))
        if not self._section.calibrate:
            return
        works = {f"content-free-{number}": text for number, text in enumerate(CONTENT_FREE)}
        session = super().open(engine, tokenizer, exact=True)
        self._content_free = []
        try:
            answer_all(session, works, observe=self.observe)
            mean = np.logaddexp.reduce(self._content_free, axis=0) - np.log(len(works))
        finally:
            self._content_free = None
        self._bias = mean

    def _log_probabilities(self, found: Sequence[Likelihood]) -> np.ndarray:
        """float64 `[labels]`."""
        by_mean = self._section.normalize == "mean"
        scores = np.array([one.per_token if by_mean else one.logprob for one in found])
        scores = scores - self._bias
        return scores - np.logaddexp.reduce(scores)

    def _pairs(self, work: str | list[dict], tokenizer: Tokenizer) -> list:
        if not self._section.chat:
            before = self._before.replace("{text}", work)
            after = self._after.replace("{text}", work)
            labels = [label + after for label in self._section.labels]
            return [split_pair(tokenizer, before, label) for label in labels]
        try:
            context = tokenizer.apply_chat(self._messages(work) if isinstance(work, str) else work)
        except ValueError as error:
            raise RowError("invalid_prompt", str(error)) from error
        return [chat_pair(tokenizer, context, label) for label in self._section.labels]

    def _messages(self, text: str) -> list[dict]:
        system = self._section.system
        messages = [{"role": "system", "content": system}] if system else []
        return [*messages, {"role": "user", "content": self._before.replace("{text}", text)}]


def classify_fields(item: str | Sequence[Mapping]) -> dict[str, Any]:
    """The row without its id of a text or of a chat's messages."""
    return {"text": item} if isinstance(item, str) else {"messages": item}


def _split_template(section: ScoringSection) -> tuple[str, str]:
    """What stands before the label, with {text} in it, and after it."""
    template = section.template or ("{text}" if section.chat else "{text}\nLabel: {label}")
    before, label, after = template.partition("{label}")
    if "{text}" not in before:
        raise ValueError(f"scoring.template={template!r} has no place for the text: want {{text}}")
    if bool(label) == section.chat:
        wanted = "no {label}, the label is the answer" if section.chat else "{label} after {text}"
        raise ValueError(f"scoring.template={template!r}: want {wanted}")
    return before, after
