"""Our engine as a contender of `compare_scoring.py`: texts, or rows with labels, through the modes
that score.
"""

import time

from lepton_jax.api import LeptonEngine
from lepton_jax.config import EngineSection, ModelSection, RunConfig
from lepton_jax.engine.scored import ScoreSpec
from lepton_jax.jobs.pairs import Pair, Questions


class Contender:
    """A preset in a dtype. `labels` are the ids of each label; without them texts are scored."""

    def __init__(self, spec: dict):
        section = EngineSection(page_size=spec["page_size"], max_len=512)
        config = RunConfig(model=ModelSection(spec["model"], dtype=spec["dtype"]), engine=section)
        self._labels = [tuple(label) for label in spec["labels"]]
        self._lepton = LeptonEngine().load_model(config=config, compression=spec["preset"])

    def warm_up(self, rows: list[list[int]]) -> None:
        """Compiles for these rows and runs them."""
        questions = [question for row in rows for question in self._ask(row).questions]
        self._lepton.start(
            workload=[(len(q.ids), ScoreSpec.of(q.scoring)) for q in questions], strict=True
        )
        self.run(rows)

    def run(self, rows: list[list[int]]) -> tuple[int, float]:
        """(rows, or tokens of texts, seconds) for the scores of all."""
        begun = time.perf_counter()
        asked = [self._ask(row) for row in rows]
        engine, results = self._lepton.engine, {}
        for number, one in enumerate(asked):
            for place, question in enumerate(one.questions):
                engine.add_scoring(f"{number}/{place}", question.ids, question.scoring)
        while engine.has_work:
            results |= {output.request_id: output.scored for output in engine.step()}
        for number, one in enumerate(asked):
            one.likelihoods([results[f"{number}/{n}"] for n in range(len(one.questions))])
        seconds = time.perf_counter() - begun
        return (len(rows) if self._labels else sum(map(len, rows))), seconds

    def _ask(self, row: list[int]) -> Questions:
        if not self._labels:
            return Questions([Pair(tuple(row[:1]), tuple(row[1:]), 1)])
        return Questions([Pair(tuple(row), label, 1) for label in self._labels])
