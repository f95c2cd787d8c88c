"""`Structure`: which parts of a model structured pruning leaves, and the config that comes of it.

Plain data and arithmetic on sizes; what is kept is measured in `structured.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from lepton_jax.models.build import Model, abstract_model
from lepton_jax.models.config import ModelConfig

_FFN_STEP = 128  # most channels by which a kept ffn may be rounded: a TPU's lanes


@dataclasses.dataclass(frozen=True)
class Structure:
    """What is left of a model.

    Attributes:
      drop_layers: how many layers are removed; 0: none.
      keep_ffn: share of the ffn channels that is kept; 1: all.
      keep_kv_heads: kv heads that are kept, with their query heads; 0: all.
      keep_experts: experts that are kept; 0: all.
    """

    drop_layers: int = 0
    keep_ffn: float = 1.0
    keep_kv_heads: int = 0
    keep_experts: int = 0

    def __bool__(self) -> bool:
        return self != Structure()

    def __str__(self) -> str:
        values = dataclasses.asdict(self).items()
        default = dataclasses.asdict(Structure())
        return " ".join(f"{name}={value}" for name, value in values if value != default[name])

    def plan(self, config: ModelConfig, layers: Sequence[int] | None = None) -> ModelConfig:
        """The config of the pruned model; `layers` are those kept, by default the first (sizes
        don't depend on which).

        Raises ValueError naming the field that doesn't fit the model.
        """
        self._require_fit(config)
        layers = range(config.num_layers - self.drop_layers) if layers is None else layers
        heads = self.keep_kv_heads or config.num_kv_heads
        return dataclasses.replace(
            config,
            num_layers=len(layers),
            layer_windows=tuple(config.layer_windows[i] for i in layers),
            layer_ropes=tuple(config.layer_ropes[i] for i in layers),
            num_kv_heads=heads,
            num_heads=heads * config.group,
            ffn_size=self._ffn_size(config.ffn_size),
            num_experts=self.keep_experts or config.num_experts,
        )

    def _ffn_size(self, whole: int) -> int:
        """Rounded to a power of two that suits devices, and to no more than 1/16 of the ffn."""
        step = max(1, min(math.gcd(whole, _FFN_STEP), 2 ** int(math.log2(max(1, whole // 16)))))
        return min(whole, max(step, round(self.keep_ffn * whole / step) * step))

    def _require_fit(self, config: ModelConfig) -> None:
        experts = f"{max(1, config.experts_per_token)} to {config.num_experts}"
        for name, least, most, of in (
            ("drop_layers", 0, config.num_layers - 1, f"0 to {config.num_layers - 1}"),
            ("keep_kv_heads", 0, config.num_kv_heads, f"1 to {config.num_kv_heads}, or 0 for all"),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"compression.{name}={value}: this model allows {of}")
        if not 0 < self.keep_ffn <= 1:
            raise ValueError(f"compression.keep_ffn={self.keep_ffn}: want a share, up to 1 for all")
        if config.num_experts and self.keep_ffn < 1:
            raise ValueError(
                f"compression.keep_ffn={self.keep_ffn}: the ffn of this model is "
                f"{config.num_experts} experts; remove whole ones with compression.keep_experts"
            )
        if self.keep_experts and not config.num_experts:
            raise ValueError(
                f"compression.keep_experts={self.keep_experts}: this model has no experts; take "
                "compression.keep_ffn"
            )
        few = 0 < self.keep_experts < config.experts_per_token
        if few or not 0 <= self.keep_experts <= config.num_experts:
            raise ValueError(
                f"compression.keep_experts={self.keep_experts}: this model allows {experts}, or 0 "
                "for all"
            )


def planned_model(structure: Structure, model: Model) -> Model:
    """The specs that pruning gives, without touching a weight. Raises ValueError as `plan`."""
    if not structure:
        return model
    return abstract_model(structure.plan(model.config), model.dtype, model.activation_dtype)
