"""Attention's heads on devices: kv heads in equal shares, and banks where there are fewer of them.

A bank is a set of devices that hold all kv heads. Each bank keeps the cache of its own rows, so
that no token is cached twice, and computes attention for these; all else is shared by all devices
as ever, and the sum after attention joins the banks. What is held once a bank are the weights
around attention. The scheduler deals rows out to banks. Read next: `partition.py`.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Heads:
    """K kv heads, each with G query heads of H."""

    kv_heads: int
    group: int
    head_dim: int

    def banks(self, devices: int) -> int:
        """The most banks of equal size in which no device is without a kv head."""
        banks = range(max(1, devices // self.kv_heads), 0, -1)
        return next(count for count in banks if devices % count == 0)

    def cost(self, devices: int) -> str:
        """What it costs that heads and devices aren't as many; empty where it costs nothing."""
        banks = self.banks(devices)
        places = devices // banks
        held = -(-self.kv_heads // places) * places
        if banks == 1 and held == self.kv_heads:
            return ""
        said = f"mesh.model={devices} for {self.kv_heads} kv heads: "
        if banks > 1:
            said += (
                f"{banks} banks, each with its own rows' cache and with all weights around "
                "attention" + ("; " if held > self.kv_heads else "")
            )
        if held > self.kv_heads:
            more = 100 * (held / self.kv_heads - 1)
            said += f"padded to {held}, {more:.2g} % more attention and cache"
        return said
