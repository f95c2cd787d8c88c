"""THE LOOP: `Engine.step` is one beat of schedule, run, commit, and everything above the engine
only calls it.

The engine speaks token ids: `add_request`, `add_scoring`, `step`, `abort`, `has_work`. The host
stays one beat ahead of the device: a plan is dispatched before the results of the one before are
read. Text is `lepton_jax/text`, rows and files are `lepton_jax/jobs`. Read next: `scheduler.py`
(what a beat does), `runner.py` (how it runs).
"""

import hashlib
from collections.abc import Callable, Sequence

import jax

from lepton_jax.config import EngineSection, SamplingParams
from lepton_jax.engine.beats import Beats, Listener
from lepton_jax.engine.draft_length import DraftModelRule, DraftRule
from lepton_jax.engine.protocol import Limits, Sync
from lepton_jax.engine.request import Guide, Request, StepOutput
from lepton_jax.engine.row_params import SampleSpec
from lepton_jax.engine.rungs import Sizes
from lepton_jax.engine.runner import InFlight, Runner, Shape
from lepton_jax.engine.scheduler import Scheduler
from lepton_jax.engine.scored import ScoreSpec, Scoring
from lepton_jax.engine.sizing import cache_budget, kv_dtype_of, plan_sizes
from lepton_jax.kernels.attention import backend_for
from lepton_jax.models.build import Model
from lepton_jax.sharding import Devices, Placement
from lepton_jax.tensors import CompressedTensor

Workload = Sequence[tuple[int, SamplingParams | ScoreSpec]]  # (prompt tokens, what is asked)

_NO_OUTPUT = SamplingParams(max_tokens=1)  # of requests to score: nothing is sampled


class Engine:
    """Continuous batching of requests on one device, or on several that share the model.

    Attributes:
      scheduler, runner: of its beats.
      drafts: the rule that says how many tokens are proposed in a block.
    """

    def __init__(
        self,
        model: Model,
        leaves: tuple,
        *,
        section: EngineSection,
        eos_ids: Sequence[int] = (),
        workload: Workload = (),
        strict: bool = False,
        devices: Devices | None = None,
        sync: Sync | None = None,
    ):
        """Plans memory; compiles nothing yet.

        Args:
          model: the abstract model; `leaves` its weights in the order of its specs.
          section: sizes; 0 where the engine shall choose.
          eos_ids: ids that end a text unless a row ignores them.
          workload: of the coming requests, where they are known: it bounds the cache.
          strict: a program that the warm-up did not compile is an error instead of a warning.
          devices: to run on, as `Placement` takes them; several share the model, each with its part
            of every weight. By default where the leaves are; others are cut and sent there.
          sync: of the other hosts, where the devices are those of several.
        """
        placement = Placement.holding(leaves, model.heads)
        if devices is not None:
            placement = Placement(devices, model.heads)
        leaves, model = placement.put_all(model.specs, leaves), model.on(placement.axis)
        backend = backend_for(placement.devices[0].platform, section.attention_block)
        compressed = any(isinstance(leaf, CompressedTensor) for leaf in leaves)
        kv_dtype = kv_dtype_of(section, model.specs["embed"].dtype, compressed=compressed)
        planned = cache_budget(placement.first, _nbytes(leaves) // len(placement.devices))
        budget = [int(section.cache_share * most) for most in planned]
        self._sync, budget = sync, sync.share(budget) if sync else budget
        sizes = plan_sizes(
            section,
            model,
            backend=backend,
            kv_dtype=kv_dtype,
            totals=[count + asked.max_tokens for count, asked in workload],
            budget=budget,
        )
        self.eos_ids, self.max_len = tuple(eos_ids), sizes.max_len
        self.limits, self.pages = _limits(model, sizes), (sizes.num_pages,)
        self.runner = Runner(
            model.with_context(sizes.max_len),
            leaves,
            sizes=sizes,
            backend=backend,
            kv_dtype=kv_dtype,
            eos_ids=self.eos_ids,
            strict=strict,
            placement=placement,
        )
        self.scheduler = Scheduler(sizes, q_tile=backend.Q_TILE, prefix_cache=section.prefix_cache)
        self._in_flight: InFlight | None = None
        self._beats, self._kv_dtype = Beats(self.scheduler), kv_dtype
        self._guides, self._wants_draft = _no_guide, section.speculation == "draft"
        rule = DraftRule(self.runner.drafts, self.runner.rungs.decode, cost=section.draft_cost)
        self.drafts = self._speculate(rule, sizes.draft if section.speculation == "lookup" else 0)

    def guide_with(self, guides: Callable[[SamplingParams], Guide]) -> None:
        """Lets requests prescribe their answers: `guides` makes a guide of one from what is asked
        (`text/constraints.py`). It may raise ValueError where that can't be held.
        """
        self._guides = guides

    def draft_with(self, model: Model, leaves: tuple, *, cost: float = 0.0) -> None:
        """Lets a model propose, for `section.speculation` "draft"; before the warm-up.

        Its cache gets as many pages. `cost` as `section.draft_cost`. Raises ValueError where the
        model has another vocabulary or no output head.
        """
        runner = self.runner
        mine, theirs = runner.model.config.vocab_size, model.config.vocab_size
        if mine != theirs:
            raise ValueError(
                f"the draft model has a vocabulary of {theirs} tokens, the model one of {mine}: "
                "want the same tokenizer, such as the model compressed"
            )
        model.config.require_head("the draft model")
        model = model.on(runner.placement.axis)
        leaves = runner.placement.beside(model.heads).put_all(model.specs, leaves)
        context = model.with_context(self.max_len)
        runner.draft_with(context, leaves, kv_dtype=self._kv_dtype)
        share = _nbytes(leaves) / _nbytes(runner.leaves)
        rule = DraftModelRule(runner.drafts, runner.rungs.decode, cost=cost, share=share)
        self.drafts = self._speculate(rule, runner.sizes.draft)
        self._wants_draft = False

    def _speculate(self, rule: DraftRule, most: int) -> DraftRule:
        """Drafts of up to `most` tokens, by this rule."""
        self.scheduler.speculate(most)
        self.scheduler.draft_policy = rule.choose
        if most:
            self.listen(rule)
        return rule

    def step(self) -> list[StepOutput]:
        """One beat. Returns what the beat before produced.

        A beat that fails or is interrupted takes the open requests and the cache of prompts with
        it, because nobody knows how much of it the device has done.
        """
        try:
            return self._beat()
        except BaseException:
            self._reset()
            raise

    def _beat(self) -> list[StepOutput]:
        plan = self.scheduler.schedule()  # 1 schedule
        if self._sync:
            self._sync.agree(plan)
        flight = self.runner.dispatch(plan) if plan else None  # 2 run
        done, self._in_flight = self._in_flight, flight
        if done is None:
            return []
        outputs = self.scheduler.commit(done.plan, *self.runner.read(done))  # 3 commit
        self.drafts.read(outputs)
        self._beats.tell(done, outputs)
        return outputs

    def _reset(self) -> None:
        self._in_flight = None
        self.scheduler.reset()
        self.runner.reset()
        self.drafts.forget()

    @property
    def has_work(self) -> bool:
        """Whether another step can produce something."""
        return self._in_flight is not None or self.scheduler.has_work

    def add_request(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams
    ) -> None:
        """Queues a request. Raises ValueError, saying why, on one that can never be served."""
        if self._wants_draft:
            raise RuntimeError("engine.speculation=draft: call draft_with(model, leaves) first")
        self.limits.check_request(prompt_ids, params)
        seed, guide = _seed(request_id, params), self._guides(params) if params.guided else None
        request = Request(request_id, tuple(prompt_ids), params, seed=seed, guide=guide)
        self.scheduler.add(request)
        self.drafts.add(request_id, prompt_ids)
        self.runner.require(SampleSpec.of(params, self.eos_ids))

    def add_scoring(self, request_id: str, prompt_ids: Sequence[int], scoring: Scoring) -> None:
        """Queues a prompt to score; its one output has `.scored`. Raises ValueError as above."""
        self.limits.check_scoring(prompt_ids, scoring)
        request = Request(request_id, tuple(prompt_ids), _NO_OUTPUT, scoring=scoring)
        self.scheduler.add(request)
        self.runner.require(ScoreSpec.of(scoring))

    def abort(self, request_id: str) -> None:
        """Drops a request wherever it is; nothing more comes out for it."""
        self.scheduler.abort(request_id)
        self.drafts.drop(request_id)

    def forget(self) -> None:
        """As if nothing had been served: what comes next doesn't depend on what came before, down
        to the rounding. Raises ValueError while a request is open.
        """
        if self.scheduler.has_work:
            raise ValueError("requests are open: forget only when all are answered or aborted")
        while self._in_flight is not None:
            self.step()
        self.scheduler.reset()
        self.runner.forget()
        self._beats.forget()

    def warm_up(
        self,
        workload: Workload,
        *,
        wait: bool = True,
        only: Callable[[Shape], bool] | None = None,
    ) -> None:
        """Compiles the programs that requests of a workload can reach, and allocates the cache.

        Args:
          workload: of the coming requests.
          wait: returns when all are ready. Otherwise steps wait for what they need.
          only: which of these programs, by a guess: others are compiled when they are needed.

        Raises ValueError where they would need an output head that the model hasn't.
        """
        for _, asked in workload:
            self.limits.check_head(asked)
            scores = isinstance(asked, ScoreSpec)
            self.runner.require(asked if scores else SampleSpec.of(asked, self.eos_ids))
        scored = [(count, asked) for count, asked in workload if isinstance(asked, ScoreSpec)]
        others = [(count, asked) for count, asked in workload if not isinstance(asked, ScoreSpec)]
        shapes = []
        if others:
            free = [count for count, asked in others if not asked.guided]
            cached = max(free[: self.runner.sizes.rows], default=0)
            shapes += self.runner.shapes_for(self._prefilled(others), len(free), cached)
        if scored:
            shapes += self.runner.score_shapes_for(self._prefilled(scored))
        wanted = [shape for shape in shapes if only is None or only(shape)]
        self.runner.warm_up(wanted, wait=wait, guessed=only is not None)

    def _prefilled(self, workload: Workload) -> int:
        """Tokens that the prefills of a workload compute at most, padding to tiles included."""
        tile, again = self.runner.backend.Q_TILE, self._may_preempt(workload)
        counts = [  # of preempted rows and of guided ones outputs are prefilled too
            count + asked.max_tokens * (again or bool(asked.guided)) for count, asked in workload
        ]
        return sum(-(-count // tile) * tile for count in counts)

    def _may_preempt(self, workload: Workload) -> bool:
        """Whether pages can run out, so that rows must be prefilled again."""
        s = self.runner.sizes
        totals = (min(s.max_len, count + params.max_tokens) for count, params in workload)
        pages = sorted((-(-total // s.page_size) for total in totals), reverse=True)
        unlucky = (s.banks - 1) * pages[0] if pages else 0  # room that is in other banks
        return sum(pages[: s.rows]) + unlucky > s.banks * (s.num_pages - 1)

    def listen(self, listener: Listener) -> None:
        """Tells a listener of every beat from now on, after its results are committed."""
        self._beats.listeners.append(listener)

    def stats(self) -> dict:
        """Counts and seconds since the engine was made, and how full it is."""
        programs = self.runner.programs
        return (
            vars(self.scheduler.counters)
            | vars(self.scheduler.load)
            | vars(self.runner.timings)
            | dict(
                slots=self.scheduler.most.live_rows,
                programs=len(programs.compiled),
                compile_seconds=programs.seconds,
                late_compiles=programs.late,
            )
        )

    def close(self) -> None:
        """Gives the memory of cache and weights back. Running requests are not waited for, and
        nothing can be asked any more but `stats`.
        """
        self._in_flight = None
        self.scheduler.reset()
        self.runner.close()


def _limits(model: Model, sizes: Sizes) -> Limits:
    return Limits(
        vocab_size=model.config.vocab_size,
        max_len=sizes.max_len,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages,
        num_layers=model.config.num_layers,
        has_head=bool(model.config.head_path),
    )


def _seed(request_id: str, params: SamplingParams) -> int:
    """The row's own seed, or one drawn from its id: the same file gives the same samples."""
    if params.seed is not None:
        return params.seed
    return int.from_bytes(hashlib.blake2b(request_id.encode(), digest_size=8).digest(), "little")


def _nbytes(leaves: tuple) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(leaves))


def _no_guide(params: SamplingParams) -> Guide:
    raise ValueError(
        f"sampling.{params.guided} prescribes an answer, and nothing here makes guides: call "
        "guide_with first"
    )
