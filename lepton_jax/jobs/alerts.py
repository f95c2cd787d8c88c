"""Rows that somebody should look at now: `scoring.alert` of the mode classify.

A condition such as "angry>=0.7" marks output rows with "alert": true. Each of these is also said on
the terminal and added at once to `<output>.alerts.jsonl`, before the row itself is written: a kill
may repeat an alert, never lose one. Read next: `classify.py`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lepton_jax.jobs.files.places import JobError, is_remote, reason

log = logging.getLogger(__name__)


def parse_alert(text: str, labels: Sequence[str]) -> tuple[str, float] | None:
    """("angry", 0.7) of "angry>=0.7"; None of "". Raises ValueError on anything else."""
    if not text:
        return None
    label, _, threshold = (part.strip() for part in text.rpartition(">="))
    try:
        least = float(threshold)
    except ValueError:
        least = -1.0
    if label not in labels or not 0 <= least <= 1:
        raise ValueError(
            f"scoring.alert={text!r}: want LABEL>=P with a label of {', '.join(labels)} and P from "
            "0 to 1"
        )
    return label, least


class Alerts:
    """The file of a job's alerts."""

    def __init__(self, output: str):
        """Raises JobError on an output that is no local file: a bucket's files can't grow."""
        if is_remote(output):
            raise JobError(f"scoring.alert needs a local job.output, not {output!r}")
        self.path = f"{output}.alerts.jsonl"
        self.count = 0

    def clear(self) -> None:
        """Drops those of an earlier run."""
        Path(self.path).unlink(missing_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        """Says and stores an output row. Raises JobError where it can't be stored."""
        self.count += 1
        log.warning("alert: row %s: %s %.3f", line["id"], line["label"], line["probability"])
        try:
            with Path(self.path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise JobError(f"{self.path} can't be written: {reason(error)}") from error
