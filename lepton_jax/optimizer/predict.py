"""What a candidate would take, without running it: costs from the roofline, corrected by what was
measured, through the simulated engine; and whether it fits into memory.
"""

import dataclasses
from collections.abc import Sequence

import jax

from lepton_jax.compression.presets import compress_specs
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import RunConfig
from lepton_jax.engine.scored import Scoring
from lepton_jax.engine.sizing import kv_dtype_of, wanted_pages
from lepton_jax.kernels.attention import backend_for
from lepton_jax.models.build import Model
from lepton_jax.optimizer.costs import Costs
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow, SimulatedSizes
from lepton_jax.optimizer.trial import LOOK_AHEAD
from lepton_jax.planning.chips import chip_here
from lepton_jax.planning.memory import memory_of
from lepton_jax.planning.roofline import decode_cost, prefill_cost
from lepton_jax.planning.served import Served

_DISPATCH = 0.002  # seconds that the host needs for a beat, where nothing is measured
_ROWS, _TOKENS = (1, 32), (128, 512)  # at which the roofline is read


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Predicted seconds of the sample, and bytes on the device."""

    seconds: float
    memory: int


class Predictor:
    """Predicts candidates of one model and sample.

    `learn` takes what a candidate's programs cost; a preset that nothing was measured of is
    scaled from one that was by what the roofline says of both.
    """

    def __init__(self, model: Model, requests: Sequence[SampledRequest]):
        self._model, self._requests = model, requests
        self._backend = backend_for(jax.default_backend())
        self._lengths = [request.limit for request in requests]
        self._measured: dict[str, Costs] = {}
        self._served: dict[tuple[str, str], Served] = {}
        self._drawn: dict[tuple[str, str], Costs] = {}

    def learn(self, config: RunConfig, costs: Costs, lengths: Sequence[int]) -> None:
        """What was measured: costs of a config's programs, outputs of each request."""
        self._measured[config.compression.preset] = costs
        self._lengths = list(lengths)

    def costs(self, config: RunConfig) -> Costs:
        """Of a config's programs."""
        preset, kv = config.compression.preset, config.engine.kv_dtype
        drawn = self._roofline(config)
        if not self._measured:
            return drawn
        if preset in self._measured:
            return self._measured[preset]
        base, measured = next(iter(self._measured.items()))
        before = self._drawn[base, kv]
        step = drawn.step_seconds(_ROWS[1]) / before.step_seconds(_ROWS[1])
        program = drawn.prefill_seconds(_TOKENS[1]) / before.prefill_seconds(_TOKENS[1])
        return dataclasses.replace(
            measured,
            step=measured.step * step,
            step_row=measured.step_row * step,
            program=measured.program * program,
            program_token=measured.program_token * program,
        )

    def outlook(self, config: RunConfig) -> Outlook:
        """Of a candidate applied to the config."""
        sizes = self._sizes(config)
        engine = SimulatedEngine(sizes, self.costs(config))
        if config.optimizer.feedback != "off":
            Feedback(engine, timed=False, objective=config.optimizer.objective)
        rows = [
            SimulatedRow(
                request.prompt_ids,
                request.limit,
                max(1, length) if request.limit else 0,
                request.asked if isinstance(request.asked, Scoring) else None,
            )
            for request, length in zip(self._requests, self._lengths, strict=True)
        ]
        return Outlook(engine.run(rows), self._memory(config, sizes))

    def _memory(self, config: RunConfig, sizes: SimulatedSizes) -> int:
        return memory_of(self._serve(config), sizes).total

    def _sizes(self, config: RunConfig) -> SimulatedSizes:
        """As the engine plans them for this sample."""
        e = config.engine
        context = self._model.config.max_position
        totals = [len(request.prompt_ids) + request.limit for request in self._requests]
        max_len = e.max_len or min(context, max(totals))
        totals = [min(max_len, total) for total in totals]
        pages = wanted_pages(totals, rows=e.rows, page_size=e.page_size)
        waits = config.optimizer.objective == "latency"
        return SimulatedSizes(
            rows=e.rows,
            page_size=e.page_size,
            num_pages=e.num_pages or pages,
            prefill_chunk=e.prefill_chunk,
            decode_block=e.decode_block,
            max_len=max_len,
            prefix_cache=e.prefix_cache,
            tile=self._backend.Q_TILE,
            has_views=hasattr(self._backend, "open_view"),
            queue=e.rows * (1 if waits else LOOK_AHEAD),
        )

    def _serve(self, config: RunConfig) -> Served:
        key = config.compression.preset, config.engine.kv_dtype
        if key not in self._served:
            rules = Recipe.from_config(config.compression).rules
            specs = self._model.specs
            leaves = compress_specs(rules, specs) if rules else specs
            own, compressed = specs["embed"].dtype, bool(rules)
            kv_dtype = kv_dtype_of(config.engine, own, compressed=compressed)
            self._served[key] = Served(self._model, leaves, self._backend, kv_dtype)
        return self._served[key]

    def _roofline(self, config: RunConfig) -> Costs:
        key = config.compression.preset, config.engine.kv_dtype
        if key not in self._drawn:
            served, chip = self._serve(config), chip_here()
            context = max(1, max(len(r.prompt_ids) + r.limit for r in self._requests) // 2)
            few, many = (
                decode_cost(served, chip, rows=rows, context=context).seconds for rows in _ROWS
            )
            short, long = (prefill_cost(served, chip, tokens=n).seconds for n in _TOKENS)
            row = max(0.0, many - few) / (_ROWS[1] - _ROWS[0])
            token = max(0.0, long - short) / (_TOKENS[1] - _TOKENS[0])
            self._drawn[key] = Costs(
                block=_DISPATCH,
                step=few - row,
                step_row=row,
                program=max(0.0, short - token * _TOKENS[0]),
                program_token=token,
            )
        return self._drawn[key]
