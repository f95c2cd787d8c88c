"""Which mode a config asks for: that of `job.mode`, for a cascade twice. Read next: `modes.py`."""

from lepton_jax.config import RunConfig
from lepton_jax.jobs.cascade import CascadeMode, check_cascade
from lepton_jax.jobs.classify import ClassifyMode
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.modes import Mode
from lepton_jax.jobs.perplexity import PerplexityMode
from lepton_jax.jobs.rank import RankMode
from lepton_jax.jobs.score import ScoreMode

_MAKERS = {
    "generate": lambda config: GenerateMode(config.sampling),
    "score": lambda config: ScoreMode(choices_only=bool(config.cascade.agreement)),
    "classify": lambda config: ClassifyMode(config.scoring),
    "embed": lambda config: EmbedMode(config.scoring.pooling, config.scoring.layer),
    "rank": lambda config: RankMode(config.scoring),
    "perplexity": lambda config: PerplexityMode(config.scoring.window, config.scoring.stride),
}
_CHOOSING = ("score", "classify", "rank")


def mode_for(config: RunConfig) -> Mode:
    """The mode of a run. Raises ValueError where its settings don't fit together."""
    name, alert = config.job.mode, config.scoring.alert
    if alert and name != "classify":
        raise ValueError(f"scoring.alert={alert!r} is of job.mode=classify, not of {name}")
    if config.engine.speculation != "off" and name != "generate":
        raise ValueError(
            f"engine.speculation={config.engine.speculation!r} is about decoding, and "
            f"job.mode={name!r} decodes nothing: leave it out"
        )
    make = _MAKERS[name]
    if not config.cascade.agreement:
        return make(config)
    if name not in _CHOOSING:
        raise ValueError(
            f"cascade.agreement is about what models choose, and job.mode={name!r} isn't: want "
            f"{', '.join(_CHOOSING)}, or cascade.agreement=0"
        )
    check_cascade(config)
    return CascadeMode.of(lambda: make(config), config)
