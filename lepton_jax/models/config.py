"""What a decoder is: sizes, quirks and positions of one language model, whatever file it came from.

`ModelConfig` is the only thing that `decoder.py` reads; every field is documented here and read
somewhere (a test checks). How the fields follow from a Hugging Face config or GGUF metadata is in
`families/`, one short file per family; `registry.py` picks the family. RoPE's formulas are in
`rope.py`. The tokens that open and end a text belong to `lepton_jax/text`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "tensor")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
NO_ROPE = -1
NO_HEAD = (
    "has no output head, as embedding models have none: it gives embeddings (job.mode=embed, or "
    "rank with rank_by=similarity), and nothing that needs probabilities of tokens"
)


@dataclass(frozen=True)
class RopeConfig:
    """One rotary position embedding; a model may use several (Gemma 3: global and local layers).

    Attributes:
      theta: base of the geometric series of wavelengths.
      dim: how many leading dimensions of a head rotate (H unless the model rotates a part).
      kind: one of ROPE_KINDS. "tensor": divisors come with the weights, as the parameter
        `rope_factors`.
      factor: by how much the context was stretched (linear, dynamic, llama3, yarn).
      trained_len: positions that the model saw before it was stretched.
      low_freq_factor: llama3, wavelengths above trained_len / this are divided by `factor`.
      high_freq_factor: llama3, wavelengths below trained_len / this stay.
      beta_fast: yarn, rotations over trained_len from which a dimension stays.
      beta_slow: yarn, rotations over trained_len below which a dimension is divided by `factor`.
      truncate: yarn, whether the two bounds are rounded outwards to whole dimensions.
      attention_factor: multiplies cos and sin (yarn, longrope).
      short_factors: longrope, divisor per rotating pair while the context is within trained_len.
      long_factors: longrope, the same beyond it.
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    trained_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope kind {self.kind!r} is unknown; known: {', '.join(ROPE_KINDS)}")
        if self.dim < 2 or self.dim % 2:
            raise ValueError(f"rope dim {self.dim} must be even and at least 2: pairs rotate")
        if self.kind in ("dynamic", "llama3", "yarn", "longrope") and self.trained_len <= 0:
            raise ValueError(
                f"rope kind {self.kind!r} needs the trained length, found {self.trained_len}"
            )
        if self.kind == "longrope":
            for name in ("short_factors", "long_factors"):
                if len(getattr(self, name)) != self.dim // 2:
                    raise ValueError(
                        f"longrope {name} has {len(getattr(self, name))} values; "
                        f"{self.dim} rotating dimensions need {self.dim // 2}"
                    )


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer.

    Attributes:
      family: name of the file in `families/` that knows the weight names.
      vocab_size: V.
      num_layers: L.
      hidden_size: D.
      ffn_size: F, of each expert where there are experts.
      num_heads: N, query heads.
      num_kv_heads: K; G = N / K query heads share one.
      head_dim: H.
      activation: of the gated ffn, one of ACTIVATIONS.
      norm_eps: added to the mean square in RMSNorm.
      embed_scale: multiplies the embeddings (Gemma: sqrt(D)).
      tie_embeddings: the output head is the embedding table.
      qkv_bias: biases on q, k and v.
      out_bias: a bias on the attention output.
      ffn_bias: biases on gate, up and down.
      qk_norm: RMSNorm over H on q and k, before RoPE.
      post_norms: RMSNorm on each block's output, before it is added (Gemma 2 and 3).
      attn_scale: multiplies q . k.
      attn_soft_cap: scores become cap * tanh(score / cap); 0 = none.
      final_soft_cap: the same for the logits; 0 = none.
      layer_windows: per layer, how many tokens a query sees, itself included; 0 = all.
      ropes: the rotary embeddings in use.
      layer_ropes: per layer, an index into `ropes` or NO_ROPE.
      rope_factor_sets: rows of the parameter `rope_factors` (1, or 2 = short and long); 0 = no such
        parameter.
      max_position: longest context that the model claims.
      context_len: longest context that will be run, 0 = not said. Longrope takes its long factors
        where this exceeds its trained length, so that a token's keys never depend on how long its
        text turns out to be.
      num_experts: E; 0 = a dense ffn.
      experts_per_token: experts that each token visits.
      norm_expert_weights: the weights of a token's experts are divided by their sum.
      has_head: an untied model has an output head; without one, as embedding models are saved,
        nothing but hidden states comes out.
    """

    family: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ropes: tuple[RopeConfig, ...]
    layer_ropes: tuple[int, ...]
    layer_windows: tuple[int, ...]
    max_position: int
    norm_eps: float
    attn_scale: float
    tie_embeddings: bool
    activation: str = "silu"
    embed_scale: float = 1.0
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    attn_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    rope_factor_sets: int = 0
    context_len: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    norm_expert_weights: bool = True
    has_head: bool = True

    def __post_init__(self):
        for name in (
            "vocab_size",
            "num_layers",
            "hidden_size",
            "ffn_size",
            "num_heads",
            "head_dim",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.num_kv_heads <= 0 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"activation {self.activation!r} is unknown; known: {', '.join(ACTIVATIONS)}"
            )
        for name in ("layer_windows", "layer_ropes"):
            if len(getattr(self, name)) != self.num_layers:
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} entries for {self.num_layers} layers"
                )
        if any(not NO_ROPE <= i < len(self.ropes) for i in self.layer_ropes):
            raise ValueError(f"layer_ropes {self.layer_ropes} index {len(self.ropes)} ropes")
        if self.num_experts and not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} must be 1..{self.num_experts} "
                "(num_experts)"
            )

    @property
    def group(self) -> int:
        """G: query heads per kv head."""
        return self.num_heads // self.num_kv_heads

    @property
    def head_path(self) -> str:
        """Of the weight that makes logits; "" where there is none."""
        return "embed" if self.tie_embeddings else "head" if self.has_head else ""

    def require_head(self, name: str) -> None:
        """Raises ValueError, naming the model so, where nothing makes logits."""
        if not self.head_path:
            raise ValueError(f"{name} {NO_HEAD}")

    def as_dict(self) -> dict[str, Any]:
        """In JSON types, for files and fingerprints. A head goes without saying, as when there was
        no model without one.
        """
        values = dataclasses.asdict(self)
        if self.has_head:
            values.pop("has_head")
        return values

    def require_room(self, name: str, tokens: int) -> None:
        """Raises ValueError, naming the field, where its tokens are more than the model claims."""
        if tokens > self.max_position:
            raise ValueError(
                f"{name} is {tokens}, but the model's longest context is {self.max_position}: "
                "lower it"
            )

    def with_context(self, length: int) -> ModelConfig:
        """The same model run with contexts of at most `length` tokens (see `context_len`)."""
        if not 0 < length <= self.max_position:
            raise ValueError(
                f"context length {length} must be 1..{self.max_position}, the longest that the "
                "model claims"
            )
        return dataclasses.replace(self, context_len=length)
