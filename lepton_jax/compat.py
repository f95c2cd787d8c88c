"""The jax names that have moved between releases, imported in one place.

Ground level: anything in the package may import this, and it imports only jax. What has been stable
from jax 0.8.1 to 0.12 is imported where it is used; a name comes here once a release moves it, or
when it lives in `jax.experimental`, where it may move without notice.
Read next: `kernels/attention_tpu.py`, which runs the kernel found here.
"""

from collections.abc import Callable
from typing import Any

import jax

OLDEST_JAX = (0, 8, 1)


def require_jax() -> None:
    """Raises ImportError, with the way out, when jax is older than the oldest supported one."""
    if jax.__version_info__ < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        raise ImportError(
            f"jax {jax.__version__} is installed and lepton_jax needs {oldest} or newer: "
            f"pip install 'jax>={oldest}'"
        )


def ragged_paged_attention() -> Callable:
    """jax's own Pallas kernel for TPU; imported on call, since Pallas takes a second to import.

    Raises:
      ImportError: this jax has no such kernel where 0.8.1 to 0.12 have it.
    """
    require_jax()
    try:
        from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
    except ImportError as error:
        raise ImportError(
            f"jax {jax.__version__} does not hold the ragged paged attention kernel for TPU: "
            "install a jax from 0.8.1 to 0.12, or correct its import in lepton_jax/compat.py"
        ) from error
    return ragged_paged_attention


def coordination_client() -> Any:
    """The client of jax's coordination service, after `jax.distributed.initialize`."""
    from jax._src import distributed

    return distributed.global_state.client
