"""What a candidate would take, without running it: costs from the roofline, corrected by what was
measured, on the beats of a simulated run; and whether it fits into memory.
"""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compression.presets import compress_specs
from lepton_jax.compression.recipe import Recipe
from lepton_jax.config import CompressionSection, MeshSection, RunConfig
from lepton_jax.engine.scored import Scoring
from lepton_jax.engine.sizing import kv_dtype_of, max_len_of, wanted_pages
from lepton_jax.kernels.attention import backend_for
from lepton_jax.kernels.kv_cache import QUANTIZED
from lepton_jax.models.build import Model
from lepton_jax.optimizer.costs import CostMeter, Costs, assumed
from lepton_jax.optimizer.feedback import Feedback
from lepton_jax.optimizer.play import Play
from lepton_jax.optimizer.sample import SampledRequest
from lepton_jax.optimizer.shelf import draft_of
from lepton_jax.optimizer.simulated_engine import SimulatedEngine, SimulatedRow, SimulatedSizes
from lepton_jax.optimizer.trial import Trial, look_ahead
from lepton_jax.planning.chips import Chip, chip_here, shared
from lepton_jax.planning.from_config import served_of, stored_leaves
from lepton_jax.planning.memory import memory_of
from lepton_jax.planning.roofline import decode_cost, prefill_cost
from lepton_jax.planning.served import Served
from lepton_jax.tensors import CompressedTensor

_DISPATCH = 0.002  # seconds that the host needs for a beat, where nothing is measured
_ROWS, _TOKENS = (1, 32), (128, 512)  # at which the roofline is read

# With dtype of the cache, replicas, devices, attention's block.
Kind = tuple[CompressionSection, str, int, int, int]


@dataclasses.dataclass(frozen=True)
class Outlook:
    """Predicted for a candidate on the sample.

    Attributes:
      seconds: of the whole sample.
      first_token, whole: from a request's hand-over to its first and its last token, in the 95th
        percentile.
      memory: bytes on a device.
      plays: of each replica.
    """

    seconds: float
    first_token: float
    whole: float
    memory: int
    plays: tuple[Play, ...] = ()


class Predictor:
    """Predicts candidates of one model and sample.

    `learn` takes what a candidate's beats took; a kind of program that nothing was measured of is
    scaled from one that was by what the roofline says of both.
    """

    def __init__(self, model: Model, requests: Sequence[SampledRequest]):
        self._model, self._requests = model, requests
        self._platform = jax.default_backend()
        self._backend = backend_for(self._platform)
        self._lengths: Sequence[int] = [request.limit for request in requests]
        self._knows_lengths = False
        self._meters: dict[Kind, CostMeter] = {}
        self._served: dict[Kind, Served] = {}
        self._drafts: dict[tuple[Kind, Kind], Served] = {}
        self._drawn: dict[Kind, Costs] = {}
        self._plays: dict[tuple, tuple[Play, ...]] = {}
        self._feedback_costs = assumed(self._platform)
        self._knobs: Mapping[str, float] = {}

    def learn(self, config: RunConfig, trial: Trial) -> None:
        """What was measured of a config: beats, outputs of each request, knobs that did well."""
        meter = self._meters.setdefault(_kind(config), CostMeter())
        for beat in trial.beats:
            meter.take(beat)
        if not self._knows_lengths:  # later ones differ little, and plays take time
            self._knows_lengths, self._lengths = True, trial.lengths
            self._feedback_costs, self._knobs = self.costs(config), trial.knobs
            self._plays.clear()

    def costs(self, config: RunConfig) -> Costs:
        """Of a config's programs."""
        kind = _kind(config)
        drawn = self._roofline(config)
        if kind in self._meters:
            return self._meters[kind].costs(drawn)
        if not self._meters:
            return drawn
        nearest = max(self._meters, key=lambda other: _alike(kind, other))
        measured, before = self._meters[nearest].costs(self._drawn[nearest]), self._drawn[nearest]
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
        """Of a candidate applied to the config.

        Raises ValueError where nothing can be predicted: the model can't be cut so, the devices'
        interconnect isn't known, or a request doesn't fit.
        """
        costs, sizes = self.costs(config), self._sizes(config)
        plays = self._play(config, sizes)
        clocks = [play.clock(costs) for play in plays]
        pairs = list(zip(plays, clocks, strict=True))
        first = np.concatenate([clock[play.first] - clock[play.added] for play, clock in pairs])
        whole = np.concatenate([clock[play.ended] - clock[play.added] for play, clock in pairs])
        memory = memory_of(self._serve(config), sizes).total
        if config.engine.speculation == "draft":
            memory += memory_of(self._draft(config), sizes).total
        if self._platform == "cpu":  # whose devices share the host's
            memory *= config.mesh.data * config.mesh.model
        return Outlook(
            seconds=float(max(clock[-1] for clock in clocks)),
            first_token=float(np.percentile(first, 95)),
            whole=float(np.percentile(whole, 95)),
            memory=memory,
            plays=plays,
        )

    def attention_share(self, config: RunConfig) -> float:
        """Of the devices' time, what the roofline gives to attention."""
        served, chip = self._serve(config), self._chip(config)
        prompt = statistics.fmean(len(request.prompt_ids) for request in self._requests)
        length = statistics.fmean(self._lengths)
        rows = min(config.engine.rows, len(self._requests))
        steps = length / rows  # of all rows, for each request
        prefill = prefill_cost(served, chip, tokens=round(prompt))
        decode = decode_cost(served, chip, rows=rows, context=round(prompt + length / 2))
        seconds = prefill.seconds + steps * decode.seconds
        return (prefill.attention + steps * decode.attention) / seconds

    def weight_bytes(self, config: RunConfig) -> int:
        """Of a config's model on one of its devices."""
        return self._serve(config).weight_bytes

    def _play(self, config: RunConfig, sizes: SimulatedSizes) -> tuple[Play, ...]:
        """A run of each replica's share of the requests."""
        data, section = config.mesh.data, config.optimizer
        key = sizes, data, section.feedback, section.objective
        if key not in self._plays:
            pairs = zip(self._requests, self._lengths, strict=True)
            rows = [simulated(request, length) for request, length in pairs]
            plays = []
            for part in filter(None, (rows[n::data] for n in range(data))):
                engine = SimulatedEngine(sizes, self._feedback_costs)
                if section.feedback != "off":
                    Feedback(
                        engine,
                        timed=False,
                        costs=self._feedback_costs,
                        knobs=self._knobs,
                        objective=section.objective,
                    )
                plays.append(Play.of(engine, part, queue=sizes.queue))
            self._plays[key] = tuple(plays)
        return self._plays[key]

    def _sizes(self, config: RunConfig) -> SimulatedSizes:
        """As the engine plans them for this sample."""
        e = config.engine
        most = max_len_of(e, self._model.config.max_position)
        totals = [len(request.prompt_ids) + request.limit for request in self._requests]
        totals = [min(most, total) for total in totals]
        max_len = e.max_len or max(totals)
        banks = self._serve(config).axis.banks
        pages = wanted_pages(totals, rows=e.rows, page_size=e.page_size, banks=banks)
        return SimulatedSizes.of(
            dataclasses.replace(e, speculation="off"),  # plain blocks are simulated
            max_len=max_len,
            num_pages=pages,
            banks=banks,
            prefix_cache=e.prefix_cache,
            tile=self._backend.Q_TILE,
            has_views=hasattr(self._backend, "open_view"),
            queue=look_ahead(config),
        )

    def _serve(self, config: RunConfig) -> Served:
        kind = _kind(config)
        if kind not in self._served:
            rules = Recipe.from_config(config.compression).rules
            specs = self._model.specs
            stored = stored_leaves(config.model.path, self._model)
            leaves = compress_specs(rules, specs) if rules or stored is None else stored
            compressed = any(isinstance(leaf, CompressedTensor) for leaf in leaves.values())
            own = specs["embed"].dtype
            kv_dtype = kv_dtype_of(config.engine, own, compressed=compressed)
            mesh = config.mesh
            self._served[kind] = Served(
                self._model, leaves, self._backend, kv_dtype, mesh.model, mesh.expert
            )
        return self._served[kind]

    def _draft(self, config: RunConfig) -> Served:
        """The draft model beside the model, on its devices and with a cache like its own."""
        draft, other = draft_of(config), bool(config.engine.draft_model)
        key = _kind(config), _kind(draft)
        if key not in self._drafts:
            found = self._other(draft) if other else self._serve(draft)
            kv_dtype = self._serve(config).kv_dtype
            self._drafts[key] = dataclasses.replace(found, kv_dtype=kv_dtype)
        return self._drafts[key]

    def _other(self, draft: RunConfig) -> Served:
        """Another model on the model's mesh; its experts, if it has any, lie as the model's do."""
        alone = dataclasses.replace(draft, mesh=MeshSection())
        found, mesh = served_of(alone, self._chip(draft)), draft.mesh
        spread = mesh.expert if found.config.num_experts else 1
        return dataclasses.replace(found, shards=mesh.model, spread=spread)

    def _roofline(self, config: RunConfig) -> Costs:
        kind = _kind(config)
        if kind not in self._drawn:
            served, chip = self._serve(config), self._chip(config)
            if served.kv_dtype.name in QUANTIZED and hasattr(self._backend, "open_view"):
                wide = jnp.dtype(jnp.bfloat16)  # a block decodes its rows' cache once
                served = dataclasses.replace(served, kv_dtype=wide)
            context = max(1, max(len(r.prompt_ids) + r.limit for r in self._requests) // 2)
            few, many = (
                decode_cost(served, chip, rows=rows, context=context).seconds for rows in _ROWS
            )
            short, long = (prefill_cost(served, chip, tokens=n).seconds for n in _TOKENS)
            row = max(0.0, many - few) / (_ROWS[1] - _ROWS[0])
            token = max(0.0, long - short) / (_TOKENS[1] - _TOKENS[0])
            self._drawn[kind] = Costs(
                block=_DISPATCH,
                step=few - row,
                step_row=row,
                program=max(0.0, short - token * _TOKENS[0]),
                program_token=token,
            )
        return self._drawn[kind]

    def _chip(self, config: RunConfig) -> Chip:
        """A device; those of a CPU share it."""
        chip, used = chip_here(), config.mesh.data * config.mesh.model
        return shared(chip, used) if self._platform == "cpu" else chip


def simulated(request: SampledRequest, length: int) -> SimulatedRow:
    """A request that gets so many outputs."""
    scoring = request.asked if isinstance(request.asked, Scoring) else None
    length = max(1, length) if request.limit else 0
    return SimulatedRow(request.prompt_ids, request.limit, length, scoring)


def _kind(config: RunConfig) -> Kind:
    mesh, e = config.mesh, config.engine
    return config.compression, e.kv_dtype, mesh.data, mesh.model, e.attention_block


def _alike(kind: Kind, other: Kind) -> int:
    return sum(mine == theirs for mine, theirs in zip(kind, other, strict=True))
