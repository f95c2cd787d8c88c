"""One model on several devices: each holds a part of every weight and runs the same program.

`axis.py` is what a program may ask of the other devices, `partition.py` which dimension of a weight
is cut, `placement.py` puts pieces on devices and compiles programs over them. How a storage type is
cut is its own business (`CompressedTensor.pieces`). The model knows an `Axis` and no mesh.
"""

from lepton_jax.sharding.axis import WHOLE, Axis, MeshAxis
from lepton_jax.sharding.placement import Devices, Placement, grid_of, grids_of_parts

__all__ = ["WHOLE", "Axis", "Devices", "MeshAxis", "Placement", "grid_of", "grids_of_parts"]
