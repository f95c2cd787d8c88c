r"""What each way to store a weight takes in memory and time, by shape, beside dense float32.

    python scripts/bench_leaves.py
    python scripts/bench_leaves.py --shapes=4096x4096 --rows=1,32 --leaf="int8 2:4=weights=int8 \
        prune=magnitude pattern=2:4 storage=sparse"

A run multiplies activations of so many rows with as many weights of one shape as fill --mib in
float32, each once, so that none waits in a cache. Runs of all types take turns, --rounds of them.
Prints a table in markdown: bytes as a share of float32's, and for each number of rows the median
milliseconds a weight and how many times as fast as float32 that is, the median of the rounds. On a
machine that does nothing else; weights are random.
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from lepton_jax.checkpoints.loaded import leaf_bytes
from lepton_jax.compression.leaf import compress_weight
from lepton_jax.compression.recipe import parse_scheme
from lepton_jax.tensors.matmul import matmul

SHAPES = "576x1536,3072x576,4096x4096,4096x14336"  # outputs x inputs: SmolLM2 135M, Llama 8B
HALF = "prune=magnitude sparsity=0.5 storage=sparse"
LEAVES = {
    "float32": "keep",
    "int8": "weights=int8",
    "int8, groups of 32": "weights=int8 group=32",
    "int8, int8 activations": "weights=int8 activations=dynamic",
    "int4, groups of 128": "weights=int4 group=128",
    "float8": "weights=float8",
    "2:4": "weights=keep prune=magnitude pattern=2:4 storage=sparse",
    "2:4, int8": "weights=int8 prune=magnitude pattern=2:4 storage=sparse",
    "bitmask 50 %": f"weights=keep {HALF}",
    "bitmask 50 %, int8": f"weights=int8 {HALF}",
    "tiles 64x32, 50 %": f"weights=keep {HALF} pattern=64x32",
}


@jax.jit
def products(x: jax.Array, leaves: tuple) -> list[jax.Array]:
    """Of `x [weights, M, I]` with as many leaves."""
    return [matmul(x[place], leaf) for place, leaf in enumerate(leaves)]


def seconds(x: jax.Array, leaves: tuple) -> float:
    began = time.perf_counter()
    jax.block_until_ready(products(x, leaves))
    return time.perf_counter() - began


def measured(leaves: dict[str, tuple], rows: int, inputs: int, rounds: int) -> dict[str, list]:
    """Seconds of each run, by type."""
    count = len(leaves["float32"])
    x = jax.random.normal(jax.random.key(1), (count, rows, inputs))
    for each in leaves.values():
        seconds(x, each)  # compiles
    times: dict[str, list] = {name: [] for name in leaves}
    for _ in range(rounds):
        for name, each in leaves.items():
            times[name].append(seconds(x, each))
    return times


def lines(shape: tuple[int, int], schemes: dict[str, str], args) -> list[str]:
    """Of one shape. Raises ValueError where a scheme doesn't fit it."""
    dense = jax.random.normal(jax.random.key(0), shape)
    count = max(1, math.ceil(args.mib * 2**20 / dense.nbytes))
    leaves = {}
    for name, text in schemes.items():
        leaf = compress_weight(dense, parse_scheme(text, name))
        leaves[name] = tuple(jax.tree.map(jnp.copy, leaf) for _ in range(count))
    by_rows = [measured(leaves, rows, shape[1], args.rounds) for rows in args.rows]
    found = []
    for name, (leaf, *_) in leaves.items():
        cells = [f"{shape[0]}x{shape[1]}", name, f"{leaf_bytes(leaf) / dense.nbytes:.3f}"]
        for times in by_rows:
            pairs = zip(times["float32"], times[name], strict=True)
            faster = statistics.median(wide / own for wide, own in pairs)
            cells.append(f"{1e3 * statistics.median(times[name]) / count:.3f} ({faster:.2f})")
        found.append(f"| {' | '.join(cells)} |")
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help="OUTPUTSxINPUTS,...")
    parser.add_argument("--rows", default="1,8,32", type=lambda s: [int(n) for n in s.split(",")])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--mib", type=float, default=128.0, help="of float32 weights in a run")
    parser.add_argument("--leaf", action="append", help="NAME=SCHEME, instead of those that ship")
    args = parser.parse_args(argv)
    asked = dict(text.split("=", 1) for text in args.leaf or ())
    schemes = {"float32": LEAVES["float32"]} | (asked or LEAVES)
    heads = ["outputs x inputs", "weight", "bytes", *(f"ms, rows={n}" for n in args.rows)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    for text in args.shapes.split(","):
        outputs, inputs = map(int, text.split("x"))
        try:
            print("\n".join(lines((outputs, inputs), schemes, args)), flush=True)
        except ValueError as error:
            parser.error(f"{text}: {error}")


if __name__ == "__main__":
    main()
