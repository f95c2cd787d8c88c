"""What a job is configured by: its files and mode, scoring, and the cascade of two models.

The frozen sections `job`, `scoring` and `cascade` of a run; `config.py` has the others and is where
all are imported from.
"""

import dataclasses
import math

from lepton_jax.config_fields import MOST as _MOST
from lepton_jax.config_fields import check as _check
from lepton_jax.config_fields import check_types as _check_types
from lepton_jax.config_fields import doc as _doc

FORMATS = ("jsonl", "csv", "parquet", "openai_batch")
MODES = ("generate", "score", "classify", "embed", "rank", "perplexity")


@dataclasses.dataclass(frozen=True)
class JobSection:
    mode: str = _doc("generate", f"what to do with the rows: {', '.join(MODES)}")
    input: str = _doc("", "file of rows, URL, or glob of shards; may end in .gz or .zst")
    output: str = _doc(
        "",
        "file or URL to write, in the form of its ending; <output>.summary.json goes beside it; "
        "the file of a URL is made below TMPDIR first",
    )
    format: str = _doc("", "of the input: jsonl, csv, parquet, openai_batch; empty: by its ending")
    limit: int = _doc(0, "take this many rows of the input, the first; 0: all")
    columns: str = _doc("", "the columns of fields, as in prompt=question,id=key")
    template: str = _doc(
        "",
        "generate: the prompt of a row, with columns of the row in braces, as in 'Shop: {shop}.'; "
        "{{ and }} are braces; empty: rows have prompts of their own",
    )
    keep: str = _doc("", "columns to copy to the output rows, as in label,source=url")
    answer: str = _doc(
        "",
        "column with the known answer: output rows say how correct they are, the summary the mean",
    )
    order: str = _doc("input", "of output rows: input, or finished (as they are done)")
    follow: float = _doc(
        0.0, "seconds to wait for new lines of a growing input before the job ends; 0: don't"
    )
    exact: bool = _doc(
        True,
        "a resumed job gives the bytes of one that never stopped: it computes the rows of the last "
        "block, 64 x engine.rows in each replica, again; false: only rows that aren't written, and "
        "rounding may differ",
    )
    restart: bool = _doc(False, "drop what an interrupted run with other settings has done")
    report: bool = _doc(False, "write <output>.report.html, a page of rates, lengths and latencies")
    tensorboard: str = _doc("", "folder for TensorBoard's event files of the run; empty: none")

    def __post_init__(self):
        _check_types(self)
        _check(self, "format", self.format in ("", *FORMATS), f"one of {', '.join(FORMATS)}")
        _check(self, "order", self.order in ("input", "finished"), "input or finished")
        _check(self, "follow", 0 <= self.follow < math.inf, "0 (off) or a number of seconds")
        _check(self, "limit", 0 <= self.limit <= _MOST, "0 (all) or more")
        alone = "0 with job.follow, which takes all that comes"
        _check(self, "limit", not (self.follow and self.limit), alone)
        exact = "false with job.follow, where rounding depends on when rows come"
        _check(self, "exact", not (self.follow and self.exact), exact)
        _check(self, "mode", self.mode in MODES, f"one of {', '.join(MODES)}")


@dataclasses.dataclass(frozen=True)
class ScoringSection:
    """Of the modes classify, embed, rank and perplexity."""

    labels: tuple[str, ...] = _doc((), "classify: the labels")
    template: str = _doc(
        "",
        "classify: how a text with {text} and {label} reads; rank: with {query} and {candidate}; "
        "empty: one under the other",
    )
    chat: bool = _doc(
        False,
        "classify: the template is a message of the user, the label the model's answer; a row may "
        "have messages of its own instead of text",
    )
    system: str = _doc("", "classify with chat: the system message before the template's")
    alert: str = _doc(
        "", "classify: LABEL>=P marks such rows, says them and adds them to <output>.alerts.jsonl"
    )
    calibrate: bool = _doc(False, "classify: take off what labels get with a content-free text")
    normalize: str = _doc(
        "", "of several tokens' log-probabilities: sum or mean; empty: classify sum, rank mean"
    )
    pooling: str = _doc("last", "embed and similarity: hidden state of the last token, or the mean")
    layer: int = _doc(
        -1,
        "embed and similarity: hidden state after so many layers, 0 the embeddings; -1: after all "
        "and the final norm",
    )
    rank_by: str = _doc("likelihood", "rank: likelihood of the candidate, or similarity")
    window: int = _doc(1024, "perplexity: tokens of a window")
    stride: int = _doc(512, "perplexity: tokens from one window to the next")

    def __post_init__(self):
        _check_types(self)
        labels = (self.labels,) if isinstance(self.labels, str) else self.labels
        good = isinstance(labels, (list, tuple)) and all(isinstance(x, str) and x for x in labels)
        _check(self, "labels", good, "a list of texts")
        object.__setattr__(self, "labels", tuple(labels))
        _check(self, "normalize", self.normalize in ("", "sum", "mean"), "sum or mean")
        _check(self, "pooling", self.pooling in ("last", "mean"), "last or mean")
        by = ("likelihood", "similarity")
        _check(self, "layer", -1 <= self.layer <= _MOST, "-1, or 0 to the model's layers")
        _check(self, "rank_by", self.rank_by in by, " or ".join(by))
        for name in ("window", "stride"):
            _check(self, name, 1 <= getattr(self, name) <= _MOST, "1 or more")


@dataclasses.dataclass(frozen=True)
class CascadeSection:
    """Of the modes score, classify and rank: the compressed model answers where it is sure."""

    agreement: float = _doc(
        0.0,
        "share of rows, such as 0.99, whose choice is to be the uncompressed model's: the "
        "compressed one answers where it is sure, the other elsewhere; 0: off",
    )
    model: str = _doc(
        "", "path of the uncompressed model, of the same tokenizer; empty: model.path, uncompressed"
    )
    calibration: int = _doc(
        0,
        "first rows, which both answer, so that it is known where the compressed one is sure; 0: "
        "twice the fewest that can show the agreement",
    )
    audit: float = _doc(
        0.05, "share of the rows where it is sure that both answer, to see if the agreement is kept"
    )

    def __post_init__(self):
        _check_types(self)
        _check(self, "agreement", 0 <= self.agreement < 1, "0 (off), or a share below 1")
        _check(self, "calibration", 0 <= self.calibration <= _MOST, "0 (enough) or more")
        _check(self, "audit", 0 < self.audit <= 1, "more than 0, at most 1")
