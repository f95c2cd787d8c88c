"""From a config to an engine's sizes: what is 0 there is chosen here, by the model, the work and
the memory. `lepton_jax/planning` and the optimizer foresee an engine's sizes by the same rules.

Read next: `rungs.py` (the sizes), `loop.py` (who asks).
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from lepton_jax.config import EngineSection
from lepton_jax.engine.rungs import Sizes
from lepton_jax.kernels.attention import Backend
from lepton_jax.models.build import Model

log = logging.getLogger(__name__)

DEVICE_SHARE = 0.9  # of a device's memory: what weights and cache may take

# Of the machine's memory where the device is the host itself: for the caches of all such devices,
# and for one where nobody knows what it must hold, because all of it is resident at once. Of its
# size, not of what is free: a resumed job must get the sizes of the first run.
_HOST_SHARE, _UNKNOWN_SHARE = 1 / 4, 1 / 64
_DEFAULT_MAX_LEN = 4096


def device_room(device: jax.Device) -> int | None:
    """Bytes that weights and caches may still take on a device; None where it has no memory of its
    own.
    """
    memory = device.memory_stats() or {}
    if "bytes_limit" not in memory:
        return None
    return int(DEVICE_SHARE * memory["bytes_limit"] - memory.get("bytes_in_use", 0))


def cache_budget(device: jax.Device, weights: int) -> tuple[int, int]:
    """Bytes that the cache may take on a device that holds its part of the weights, of so many
    bytes: at most, and where no request is known. Devices of a host are taken to hold as much each.
    """
    free = device_room(device)
    if free is not None:
        return free, free
    total, sharers = psutil.virtual_memory().total, jax.local_device_count(device.platform)
    unknown, free = int(_UNKNOWN_SHARE * total), int(DEVICE_SHARE * total) // sharers - weights
    return max(unknown, min(int(_HOST_SHARE * total) // sharers, free)), unknown


def kv_dtype_of(section: EngineSection, own: Any, *, compressed: bool) -> Any:
    """The cache's dtype; "auto" is `own`, that of the weights, or bfloat16 where some of them are
    compressed.
    """
    if section.kv_dtype != "auto":
        return jnp.dtype(section.kv_dtype)
    return jnp.dtype(jnp.bfloat16 if compressed else own)


def max_len_of(section: EngineSection, positions: int) -> int:
    """`engine.max_len`, or what is taken where it is 0, for a model of so many positions.

    Raises ValueError where it has fewer than are asked for.
    """
    if section.max_len > positions:
        raise ValueError(
            f"engine.max_len={section.max_len} is more than the model's {positions} positions: "
            "lower it"
        )
    return section.max_len or min(positions, _DEFAULT_MAX_LEN)


def wanted_pages(tokens: Sequence[int], *, rows: int, page_size: int, banks: int = 1) -> int:
    """Pages of a bank with which none of `rows` rows waits, the longest of these together: those
    that they fill, one more for each, and the null page.
    """
    dealt = sorted(tokens, reverse=True)[:rows:banks]  # the longest first: no bank has more
    return 1 + -(-rows // banks) + sum(-(-count // page_size) for count in dealt)


def plan_sizes(
    section: EngineSection,
    model: Model,
    *,
    backend: Backend,
    kv_dtype: Any,
    totals: Sequence[int],
    budget: Sequence[int],
) -> Sizes:
    """Fills in what a config leaves to the engine: max_len and num_pages.

    Args:
      section: of the config.
      model: as one device has it.
      backend: of attention; `kv_dtype` of its cache.
      totals: tokens of prompt and most outputs of each coming request; none where none is known.
      budget: as `cache_budget` gives it. Where no request is known, the cache is larger than the
        second where one of max_len needs that.

    Raises ValueError where not one request fits.
    """
    config, page = model.config, section.page_size
    max_len = max_len_of(section, config.max_position)
    longest = [min(max_len, total) for total in totals]
    if longest and not section.max_len:
        max_len = max(longest)
    full = longest or [max_len] * section.rows
    kv_heads = model.axis.kv_share(config.num_kv_heads)
    layer = backend.cache_layer(1, page, kv_heads, config.head_dim, dtype=kv_dtype)
    page_bytes = config.num_layers * sum(spec.nbytes for spec in jax.tree.leaves(layer))
    caches = 2 if section.speculation == "draft" else 1  # a draft model's is no larger
    most, unknown = (share // caches // page_bytes for share in budget)
    least = 1 + -(-max_len // page)
    if not section.num_pages and most < least:
        raise ValueError(
            f"one request of engine.max_len={max_len} tokens needs "
            f"{caches * least * page_bytes >> 20:,} MiB of cache, but of the memory "
            f"{budget[0] >> 20:,} MiB are planned for it: lower engine.max_len, or set "
            f"engine.num_pages={least} where there is room"
        )
    banks = model.axis.banks
    wanted = wanted_pages(full, rows=section.rows, page_size=page, banks=banks)
    pages = min(wanted, most if totals else max(unknown, least))
    if totals and not section.num_pages:
        _say_who_waits(full, section, pages=pages, banks=banks)
    return Sizes.of(section, max_len=max_len, num_pages=pages, banks=banks)


def _say_who_waits(
    tokens: Sequence[int], section: EngineSection, *, pages: int, banks: int
) -> None:
    """A warning where the cache doesn't hold the longest requests that may be served at once."""
    longest = sorted(tokens, reverse=True)[: section.rows]
    needs = [
        wanted_pages(longest, rows=rows, page_size=section.page_size, banks=banks)
        for rows in range(1, len(longest) + 1)
    ]
    held = max(1, sum(need <= pages for need in needs))
    if held < len(needs):
        log.warning(
            "the memory planned for the cache, %d pages, holds about %d of engine.rows=%d where "
            "the longest requests meet: the others wait or are computed again; where there is "
            "room, set engine.num_pages=%d",
            pages,
            held,
            section.rows,
            needs[-1],
        )
