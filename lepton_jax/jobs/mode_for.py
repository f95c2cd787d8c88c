"""Which mode a config asks for: that of `job.mode`, for a cascade twice. Read next: `modes.py`."""

import dataclasses
from collections.abc import Collection
from typing import Any

from lepton_jax.config import RunConfig, ScoringSection
from lepton_jax.jobs.cascade import CascadeMode, check_cascade
from lepton_jax.jobs.classify import ClassifyMode
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.modes import Mode
from lepton_jax.jobs.perplexity import PerplexityMode
from lepton_jax.jobs.rank import RankMode
from lepton_jax.jobs.score import ScoreMode

_MAKERS = {
    "generate": lambda config: GenerateMode(config.sampling, config.job.template),
    "score": lambda config: ScoreMode(choices_only=bool(config.cascade.agreement)),
    "classify": lambda config: ClassifyMode(config.scoring),
    "embed": lambda config: EmbedMode(config.scoring.pooling, config.scoring.layer),
    "rank": lambda config: RankMode(config.scoring),
    "perplexity": lambda config: PerplexityMode(config.scoring.window, config.scoring.stride),
}
_CHOOSING = ("score", "classify", "rank")
_SCORING = {  # fields of the section scoring that a mode reads
    "classify": ("labels", "template", "chat", "system", "alert", "calibrate", "normalize"),
    "rank": ("rank_by", "template", "normalize", "pooling", "layer"),
    "embed": ("pooling", "layer"),
    "perplexity": ("window", "stride"),
}
_ONLY_WITH = {  # (mode, field): what makes the mode read it
    ("classify", "system"): ("chat", True),
    ("rank", "template"): ("rank_by", "likelihood"),
    ("rank", "normalize"): ("rank_by", "likelihood"),
    ("rank", "pooling"): ("rank_by", "similarity"),
    ("rank", "layer"): ("rank_by", "similarity"),
}


def mode_for(config: RunConfig) -> Mode:
    """The mode of a run. Raises ValueError where its settings don't fit together."""
    name = config.job.mode
    if config.job.answer and name in ("embed", "perplexity"):
        raise ValueError(
            f"job.answer={config.job.answer!r} grades answers, and job.mode={name!r} gives none "
            "that is right or wrong: leave it out"
        )
    if config.engine.speculation != "off" and name != "generate":
        raise ValueError(
            f"engine.speculation={config.engine.speculation!r} is about decoding, and "
            f"job.mode={name!r} decodes nothing: leave it out"
        )
    make = _MAKERS[name]
    if config.cascade.agreement and name not in _CHOOSING:
        raise ValueError(
            f"cascade.agreement is about what models choose, and job.mode={name!r} isn't: want "
            f"{', '.join(_CHOOSING)}, or cascade.agreement=0"
        )
    refuse_unread(name, config.scoring)
    if config.job.template and name != "generate":
        instead = " (give scoring.template)" if "template" in _SCORING.get(name, ()) else ""
        raise ValueError(
            f"job.template={config.job.template!r} is of job.mode=generate, not of {name}: leave "
            f"it out{instead}"
        )
    _refuse_unread_cascade(config)
    if not config.cascade.agreement:
        return make(config)
    check_cascade(config)
    return CascadeMode.of(lambda: make(config), config)


def refuse_unread(mode: str, scoring: ScoringSection, names: Collection[str] | None = None) -> None:
    """Raises ValueError where a field of scoring, or one of these, is set and wouldn't be read."""
    for name in _names_set(scoring):
        if names is not None and name not in names:
            continue
        value = getattr(scoring, name)
        if name not in _SCORING.get(mode, ()):
            readers = [reader for reader, fields in _SCORING.items() if name in fields]
            raise ValueError(
                f"scoring.{name}={value!r} is of job.mode={' or '.join(readers)}, not of {mode}"
            )
        condition = _ONLY_WITH.get((mode, name))
        if condition and getattr(scoring, condition[0]) != condition[1]:
            raise ValueError(
                f"scoring.{name}={value!r} is read with scoring.{condition[0]}={condition[1]} only:"
                " give that too, or leave it out"
            )


def _refuse_unread_cascade(config: RunConfig) -> None:
    if not config.cascade.agreement:
        for name in _names_set(config.cascade):
            value = getattr(config.cascade, name)
            raise ValueError(
                f"cascade.{name}={value!r} is read with a cascade.agreement only, such as 0.99: "
                "give one, or leave it out"
            )


def _names_set(section: Any) -> list[str]:
    """Fields that differ from their defaults."""
    fields = dataclasses.fields(section)
    return [field.name for field in fields if getattr(section, field.name) != field.default]
