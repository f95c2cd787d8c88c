"""How long a step takes at best: bytes over bandwidth, operations over peaks, collectives over
links (Williams, Waterman and Patterson, 2009).

Products run one after another, so a step takes the sum, over weights, of the longer of moving and
multiplying, plus attention and collectives. All of it comes from shapes; what a compiler's module
moves is `module_text.py`. Read next: `chips.py`.
"""

import dataclasses
import math

import jax.numpy as jnp

from lepton_jax.models.config import ModelConfig
from lepton_jax.planning.chips import Chip
from lepton_jax.planning.memory import bytes_of_tokens
from lepton_jax.planning.served import Served
from lepton_jax.planning.topology import SLICES, Torus, torus_of
from lepton_jax.tensors import CompressedTensor, dots

_SMALL_OPERATIONS = 16  # a layer: norms, RoPE, cache, soft max, activations and what joins them
_LOGIT_PASSES = 4  # written once, read by a greedy sampler; a CPU keeps none in registers


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Seconds of one step on one device, and the bytes and operations behind them.

    Attributes:
      weights, cache, compute, interconnect: seconds of each alone.
      seconds: of the step; `attention` of its attention.
      weight_bytes, cache_bytes: read from the device's memory.
      flops: of its products.
      reduced_bytes: that its collectives reduce.
    """

    weights: float
    cache: float
    compute: float
    interconnect: float
    seconds: float
    attention: float
    weight_bytes: int
    cache_bytes: int
    flops: int
    reduced_bytes: int

    @property
    def bound(self) -> str:
        """What takes longest: weights, cache, compute or interconnect."""
        parts = ("weights", "cache", "compute", "interconnect")
        return max(parts, key=lambda part: getattr(self, part))


def decode_cost(served: Served, chip: Chip, *, rows: int, context: int) -> StepCost:
    """One decode step of `rows` rows with `context` cached tokens each."""
    c, own = served.config, -(-rows // served.axis.banks)
    seen = sum(min(window or context, context) for window in c.layer_windows)
    return _cost(
        served,
        chip,
        tokens=rows,
        sampled=rows,
        pairs=own * seen,
        cached=bytes_of_tokens(served, own * seen),
    )


def prefill_cost(served: Served, chip: Chip, *, tokens: int) -> StepCost:
    """The prefill of one prompt of `tokens` tokens."""
    windows = (min(window or tokens, tokens) for window in served.config.layer_windows)
    pairs = sum(window * tokens - window * (window - 1) // 2 for window in windows)
    written = bytes_of_tokens(served, served.config.num_layers * tokens)
    return _cost(served, chip, tokens=tokens, sampled=1, pairs=pairs, cached=2 * written)


def all_reduce_seconds(chip: Chip, nbytes: int, *, shards: int) -> float:
    """Of one all-reduce of `nbytes`: a reduce-scatter and an all-gather, each of which sends
    (M-1)/M of them.

    Devices that all reach each other make a ring, which takes M - 1 hops each time. The chips of a
    TPU's slice use all axes that they lie along at once; each time data goes halfway around an axis
    that closes, over two links of each chip, and from end to end of an open one, whose ends have
    one (Austin et al., 2025, "How to Scale Your Model", on collectives and their latency).

    Raises ValueError where the chip's links aren't known.
    """
    if shards == 1:
        return 0.0
    if not chip.link:
        raise ValueError(f"{chip.name}: its interconnect isn't known; plan for mesh.model=1")
    torus = torus_of(chip.name, shards) if chip.name in SLICES else Torus(shards, (), 0)
    ring = torus.devices
    seconds = (ring - 1) * (nbytes / ring / chip.link + chip.hop)
    if torus.axes:
        chips = shards // ring
        links = sum(2 if closed else 1 for _, closed in torus.axes) / (2 * torus.dims)
        hops = sum(length // 2 if closed else length - 1 for length, closed in torus.axes)
        seconds += (chips - 1) / chips * nbytes / ring / (links * chip.link) + hops * chip.hop
    return 2 * seconds


def _cost(
    served: Served, chip: Chip, *, tokens: int, sampled: int, pairs: int, cached: int
) -> StepCost:
    """`pairs`: of a query and a key that it sees, over all layers; `cached`: bytes of the cache."""
    c = served.config
    weight_bytes = flops = 0
    multiplied = seconds = 0.0
    for path in served.leaves:
        lines = sampled if path == c.head_path else tokens
        nbytes, operations = _work(served, path, tokens=lines)
        multiplying = operations / _rate(chip, served.leaves[path], lines)
        weight_bytes, flops = weight_bytes + nbytes, flops + operations
        multiplied += multiplying
        seconds += max(nbytes / chip.bandwidth, multiplying)
    scores = 4 * pairs * c.head_dim * c.group * served.axis.kv_share(c.num_kv_heads)
    multiplied_scores = scores / (chip.float32 if _is_float32(served.kv_dtype) else chip.bf16)
    attention = max(cached / chip.bandwidth, multiplied_scores)
    reduced = (
        _reductions(c) * tokens * c.hidden_size * jnp.dtype(served.model.activation_dtype).itemsize
    )
    linked = _reductions(c) * all_reduce_seconds(
        chip, reduced // _reductions(c), shards=served.shards
    )
    fixed = 0.0
    if chip.operation:
        logits = sampled * c.vocab_size * 4 * _LOGIT_PASSES
        fixed = c.num_layers * _SMALL_OPERATIONS * chip.operation + logits / chip.bandwidth
    return StepCost(
        weights=weight_bytes / chip.bandwidth,
        cache=cached / chip.bandwidth,
        compute=multiplied + multiplied_scores + fixed,
        interconnect=linked,
        seconds=seconds + attention + linked + fixed,
        attention=attention,
        weight_bytes=weight_bytes,
        cache_bytes=cached,
        flops=flops + scores,
        reduced_bytes=reduced if served.shards > 1 else 0,
    )


def _reductions(config: ModelConfig) -> int:
    """All-reduces of a step: two a layer and the embedding's."""
    return 2 * config.num_layers + 1


def _work(served: Served, path: str, *, tokens: int) -> tuple[int, int]:
    """Bytes that a step reads of a weight, and operations with it, on one device; of experts that
    are spread, on the device with the most to do.
    """
    c, leaf = served.config, served.piece(path)
    nbytes = served.piece_bytes(path)
    if path == "embed" and not c.tie_embeddings:  # only the tokens' rows
        return nbytes * min(tokens, c.vocab_size) // c.vocab_size, 0
    if not isinstance(leaf, CompressedTensor) and not leaf.inputs:
        return nbytes, 0
    operations = 2 * math.prod(leaf.shape)
    if is_expert(path):
        held, visits = c.num_experts // served.spread, tokens * c.experts_per_token
        visited = _most(held, visited_share(c, tokens), devices=served.spread)
        lines = _most(visits, 1 / served.spread, devices=served.spread)
        return int(nbytes * visited / held), int(operations * lines / held)
    return nbytes, operations * tokens


def _most(draws: int, chance: float, *, devices: int) -> float:
    """Of as many devices with this chance at each of so many draws, the count of the one with the
    most, as is expected at most (of sub-Gaussian variables: Boucheron et al., 2013, 2.5).
    """
    mean = draws * chance
    return min(draws, mean + math.sqrt(2 * math.log(devices) * mean * (1 - chance)))


def is_expert(path: str) -> bool:
    """Whether that weight is one of each expert."""
    return path.rpartition(".")[2].startswith("experts_")


def visited_share(config: ModelConfig, tokens: int) -> float:
    """Of the experts, those that some token visits, where tokens choose independently."""
    return 1 - (1 - config.experts_per_token / config.num_experts) ** tokens


def _rate(chip: Chip, leaf, rows: int) -> float:
    """FLOP/s of products with a leaf. int8 weights without int8 activations are two int8 products
    or a float32 one on a CPU, and a bf16 one elsewhere (tensors/dots.py).
    """
    if not isinstance(leaf, CompressedTensor):
        return chip.float32 if _is_float32(leaf.dtype) else chip.bf16
    static = leaf.static()
    if static.get("values") == "int8" and not static.get("group"):
        if static.get("act_bits") == 8:
            return chip.int8
        if chip.platform == "cpu":
            return chip.int8 / 2 if dots.in_two_planes(rows) else chip.float32
    return chip.bf16


def _is_float32(dtype) -> bool:
    return jnp.dtype(dtype) == jnp.float32
