"""Programs for TPUs that aren't there, and what the tests ask of them.

`topology_mesh("v6e:1x1")` gives a mesh of such devices, `abstract` describes arguments on it,
`compile_on` compiles, and the rest read what came out: bytes of arguments and of temporaries,
donations, kernel calls, copies of an array of a given shape. Nothing runs; how the compilers are
reached is `lepton_jax/planning/topology.py`. Used by the tests that guard the programs' memory.
"""

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lepton_jax.planning.topology import compile_absent, topology_devices


def topology_mesh(name: str) -> Mesh:
    """A mesh, axes ("data", "model") = (1, all chips), over a topology such as "v6e:2x2"."""
    return Mesh(np.array(topology_devices(name)).reshape(1, -1), ("data", "model"))


def abstract(mesh: Mesh, tree: object) -> object:
    """A tree of arrays or ShapeDtypeStructs as arguments that every device of the mesh holds."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree
    )


def compile_on(
    mesh: Mesh, function: Callable, *args: object, donate_argnums: Sequence[int] = ()
) -> jax.stages.Compiled:
    """Compiles `function` for the mesh; `args` are trees of arrays or ShapeDtypeStructs."""
    # Pallas asks the mesh in scope, not the arguments, which chip it compiles for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        jitted = jax.jit(function, donate_argnums=tuple(donate_argnums))
        lowered = jitted.lower(*abstract(mesh, args))
        return compile_absent(lowered)


def compiled_text(compiled: jax.stages.Compiled) -> str:
    """The scheduled module as XLA prints it."""
    return compiled.as_text()


def temp_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of temporaries in a device's memory, beyond arguments and outputs."""
    return compiled.memory_analysis().temp_size_in_bytes


def donated_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of outputs that live in donated arguments."""
    return compiled.memory_analysis().alias_size_in_bytes


def copies_of(text: str, shape: Sequence[int]) -> list[str]:
    """Lines of a module that copy an array of as many elements as this shape has, in any shape."""
    size = int(np.prod(shape))
    copies = []
    for line in text.splitlines():
        found = re.search(r"= \(?\w+\[([\d,]+)\]\S*.*? (copy|copy-start)\(", line)
        if found and int(np.prod([int(n) for n in found[1].split(",")])) == size:
            copies.append(line.strip())
    return copies


def argument_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of arguments in a device's memory, donated ones too; small ones are padded to tiles."""
    return compiled.memory_analysis().argument_size_in_bytes


def donated_count(text: str) -> int:
    """How many outputs of a module live in donated arguments: entries of its input_output_alias."""
    return text.partition("\n")[0].count("-alias)")


def kernel_calls(text: str, name: str) -> list[str]:
    """Lines of a module that call the Pallas kernel of this name."""
    calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    return [line.strip() for line in calls if name in line]
