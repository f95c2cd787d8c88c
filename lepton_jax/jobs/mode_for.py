"""Which mode a config asks for, by `job.mode`. Read next: `modes.py`."""

from lepton_jax.config import RunConfig
from lepton_jax.jobs.classify import ClassifyMode
from lepton_jax.jobs.embed import EmbedMode
from lepton_jax.jobs.generate import GenerateMode
from lepton_jax.jobs.modes import Mode
from lepton_jax.jobs.perplexity import PerplexityMode
from lepton_jax.jobs.rank import RankMode
from lepton_jax.jobs.score import ScoreMode

_MAKERS = {
    "generate": lambda config: GenerateMode(config.sampling),
    "score": lambda config: ScoreMode(),
    "classify": lambda config: ClassifyMode(config.scoring),
    "embed": lambda config: EmbedMode(config.scoring.pooling, config.scoring.layer),
    "rank": lambda config: RankMode(config.scoring),
    "perplexity": lambda config: PerplexityMode(config.scoring.window, config.scoring.stride),
}


def mode_for(config: RunConfig) -> Mode:
    """The mode of a run. Raises ValueError where its settings don't fit together."""
    return _MAKERS[config.job.mode](config)
