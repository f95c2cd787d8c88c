"""Our engine as a contender, through the same `Bench` as `python -m lepton_jax.bench`."""

from lepton_jax import compile_cache
from lepton_jax.checkpoints.load import describe, load
from lepton_jax.compression.presets import compressor, preset_rules
from lepton_jax.config import EngineSection
from lepton_jax.jobs.benchmark import Bench
from lepton_jax.jobs.workloads import Workload


class Contender:
    """A preset in a dtype; `engine_section` holds fields of EngineSection that differ from their defaults."""

    def __init__(self, spec: dict):
        compile_cache.enable()
        rules, dtype = preset_rules(spec["preset"]), spec["dtype"]
        compress = compressor(rules, describe(spec["model"], dtype=dtype).specs)
        loaded = load(spec["model"], dtype=dtype, compress=compress)
        section = EngineSection(**spec["engine_section"])
        self._bench = Bench(loaded, section, Workload(**spec["workload"]))

    def warm_up(self, prompts: list[list[int]]) -> None:
        self._bench.run(prompts)

    def run(self, prompts: list[list[int]]) -> tuple[int, float]:
        timing = self._bench.run(prompts)
        return timing.tokens, timing.seconds
