"""A compressed model is trained to predict what the dense one does, and stays as small.

    leaves, counters = Training(model, leaves, teacher, section).run(keep=..., listen=...)

The loss is KL(dense || compressed) of the next token plus the squared error of the hidden states
relative to their size (Hinton et al., arXiv 1503.02531; Sanh et al., arXiv 1910.01108). The dense
model is a `quality.Reference`: its hidden states were computed once, so its weights are needed no
more. What trains is `trainable.py`, how a window runs `window_loss.py`, files `recover.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_jax.compression.quality import Reference
from lepton_jax.compression.trainable import Trainable
from lepton_jax.compression.window_loss import WindowLoss
from lepton_jax.config import RecoverySection
from lepton_jax.models.build import Model

_WARM_UP = 0.05  # share of the steps in which the learning rate rises
_B1, _B2, _CLIP = 0.9, 0.95, 1.0  # of Adam, and the largest norm of a gradient


class Counters(NamedTuple):
    """Where a training stands, in JSON types.

    Attributes:
      step: updates that were made.
      seconds: that they took, evaluations included.
      best_step, best_kl: the evaluation with the lowest KL on held-out windows.
      evaluations: (step, loss, KL on held-out windows) of each.
    """

    step: int = 0
    seconds: float = 0.0
    best_step: int = 0
    best_kl: float = math.inf
    evaluations: tuple = ()


class State(NamedTuple):
    """A training that can go on: `arrays` is a tree of what is trained, Adam's moments and the
    best so far.
    """

    arrays: dict[str, Any]
    counters: Counters


Keep = Callable[[State], None]
Listen = Callable[[int, Mapping[str, float]], None]


class Training:
    """One training of one model."""

    def __init__(
        self, model: Model, leaves: Mapping[str, Any], teacher: Reference, section: RecoverySection
    ):
        """Raises ValueError where nothing can be trained, or the windows are too few.

        Args:
          model: of the leaves.
          leaves: of the compressed model, by path.
          teacher: the dense model on windows `[windows, T]` of text; the last `section.held_out`
            of them are not trained on.
          section: steps, learning rate and so on.
        """
        count, held = len(teacher.windows), section.held_out
        if count <= held:
            raise ValueError(
                f"recovery.held_out={held} of {count} windows leaves none to train on: lower it"
            )
        self._leaves, self._section = dict(leaves), section
        self._parts = Trainable(model, leaves, train=section.train, rank=section.rank)
        self._loss = WindowLoss(teacher.model, model, hidden_weight=section.hidden_weight)
        self._teacher = teacher
        self._ids, self._hidden = np.asarray(teacher.windows), teacher.hidden
        self._optimizer = optax.chain(
            optax.clip_by_global_norm(_CLIP), optax.scale_by_adam(b1=_B1, b2=_B2)
        )
        self._update = jax.jit(self._step, donate_argnums=0)
        self._held_out_kl = jax.jit(self._kl)

    def start(self) -> State:
        """Before the first step."""
        trained = self._parts.zeros(self._leaves, self._section.seed)
        moments = self._optimizer.init(trained)
        best = jax.tree.map(jnp.zeros_like, trained)
        return State({"trained": trained, "moments": moments, "best": best}, Counters())

    def run(
        self,
        state: State | None = None,
        *,
        keep: Keep | None = None,
        listen: Listen | None = None,
    ) -> tuple[dict[str, Any], Counters]:
        """Trains to the end of the steps, of the minutes, or of what still helps.

        Args:
          state: where to go on; by default the start.
          keep: called after each step, with what is needed to go on from there.
          listen: called after each step with its number and "loss", "kl", "hidden",
            "learning_rate", and after an evaluation "held_out_kl".

        Returns the leaves of the best evaluation and the counters. Raises ValueError where the loss
        is not finite.
        """
        arrays, counters = state or self.start()
        # What steps give lies there: elsewhere the first would be a program of its own.
        arrays = jax.device_put(arrays, jax.tree.leaves(self._leaves)[0].sharding)
        began = time.monotonic() - counters.seconds

        def timed(counters: Counters) -> Counters:
            return counters._replace(seconds=time.monotonic() - began)

        if not counters.evaluations:
            arrays, counters = self._evaluated(arrays, counters, loss=None)
        while not self._ended(counters):
            arrays, counters, found = self._trained(arrays, counters)
            counters = timed(counters)
            if counters.step % self._section.evaluate_every == 0 or self._ended(counters):
                arrays, counters = self._evaluated(arrays, counters, loss=found["loss"])
                counters = timed(counters)
                found["held_out_kl"] = counters.evaluations[-1][2]
            if listen is not None:
                listen(counters.step, found)
            if keep is not None:
                keep(State(arrays, counters))
        return self._parts.applied(self._leaves, arrays["best"]), counters

    def _ended(self, counters: Counters) -> bool:
        section = self._section
        late = section.minutes and counters.seconds >= 60 * section.minutes
        waited = counters.step - counters.best_step
        bored = section.patience and waited >= section.patience * section.evaluate_every
        return bool(counters.step >= section.steps or late or bored)

    def _rate(self, counters: Counters) -> float:
        """Up in a line, down in a cosine, by steps or by minutes, whichever is nearer its end."""
        section = self._section
        done = counters.step / section.steps
        if section.minutes:
            done = max(done, counters.seconds / (60 * section.minutes))
        warm = min(1.0, (counters.step + 1) / max(1, _WARM_UP * section.steps))
        return section.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def _trained(self, arrays, counters: Counters):
        chosen, rate = self._windows_of(counters.step), self._rate(counters)
        arrays, found = self._update(
            arrays,
            (self._leaves, self._teacher.head),
            (self._ids[chosen], self._hidden[chosen]),
            jnp.float32(rate),
        )
        found = {name: float(value) for name, value in found.items()}
        if not math.isfinite(found["loss"]):
            raise ValueError(
                f"recovery: the loss of step {counters.step + 1} is not finite: lower "
                f"recovery.learning_rate={self._section.learning_rate}"
            )
        counters = counters._replace(step=counters.step + 1)
        return arrays, counters, found | {"learning_rate": rate}

    def _windows_of(self, step: int) -> np.ndarray:
        """Indices of a step's windows: all in a new order, again and again."""
        count, batch = len(self._ids) - self._section.held_out, self._section.batch
        chosen = []
        for place in range(step * batch, (step + 1) * batch):
            order = np.random.default_rng([self._section.seed, place // count]).permutation(count)
            chosen.append(order[place % count])
        return np.asarray(chosen)

    def _evaluated(self, arrays, counters: Counters, *, loss: float | None):
        held = range(len(self._ids) - self._section.held_out, len(self._ids))
        fixed = self._leaves, self._teacher.head
        found = [
            self._held_out_kl(arrays["trained"], fixed, self._ids[i], self._hidden[i]) for i in held
        ]
        kl = float(np.mean(found))
        if not math.isfinite(kl):
            raise ValueError("recovery: predictions are not finite: the compressed model is broken")
        rows = (*counters.evaluations, (counters.step, loss, kl))
        counters = counters._replace(evaluations=rows)
        if kl < counters.best_kl:
            counters = counters._replace(best_kl=kl, best_step=counters.step)
            arrays = arrays | {"best": jax.tree.map(jnp.copy, arrays["trained"])}
        return arrays, counters

    def _step(self, arrays, fixed, windows, rate):
        """One update from a batch, whose windows come one after another; `fixed` is the leaves as
        they were and the dense model's head.
        """
        leaves, head = fixed

        def loss_of(trained, window):
            return self._loss(self._parts.applied(leaves, trained), head, *window)

        def add(total, window):
            found = jax.grad(loss_of, has_aux=True)(arrays["trained"], window)
            return jax.tree.map(jnp.add, total, found), None

        one = jax.tree.map(lambda a: a[0], windows)
        shapes = jax.eval_shape(jax.grad(loss_of, has_aux=True), arrays["trained"], one)
        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, _ = jax.lax.scan(add, zero, windows)
        gradient, found = jax.tree.map(lambda a: a / len(windows[0]), total)
        update, moments = self._optimizer.update(gradient, arrays["moments"])
        trained = jax.tree.map(lambda p, u: p - rate * u, arrays["trained"], update)
        return {"trained": trained, "moments": moments, "best": arrays["best"]}, found

    def _kl(self, trained, fixed, ids, hidden):
        leaves, head = fixed
        return self._loss(self._parts.applied(leaves, trained), head, ids, hidden)[1]["kl"]
