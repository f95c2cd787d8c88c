"""Our engine as a contender, through the same `Bench` as `python -m lepton_jax.bench`."""

from lepton_jax.api import LeptonEngine
from lepton_jax.config import EngineSection
from lepton_jax.jobs.benchmark import Bench
from lepton_jax.jobs.workloads import Workload


class Contender:
    """A preset in a dtype; `engine_section` holds EngineSection's fields that aren't default."""

    def __init__(self, spec: dict):
        lepton = LeptonEngine()
        lepton.load_model(spec["model"], dtype=spec["dtype"], compression=spec["preset"])
        section = EngineSection(**spec["engine_section"])
        work = Workload(**spec["workload"])
        self._bench = Bench(lepton.loaded, section, workload=work)

    def warm_up(self, prompts: list[list[int]]) -> None:
        self._bench.run(prompts)

    def run(self, prompts: list[list[int]]) -> tuple[int, float]:
        timing = self._bench.run(prompts)
        return timing.tokens, timing.seconds
