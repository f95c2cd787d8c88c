"""Starts a driver as several hosts on this machine, to try what a pod would do.

    python scripts/launch_local.py --hosts=2 --devices=4 -- --config=configs/quickstart.py \
        --config.mesh.model=8

Each host is a process with so many CPU devices; `mesh.model` must be all of them together. Ends
with the worst exit code. Where the machine has accelerators they are left alone.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="processes")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices of each")
    parser.add_argument("--port", type=int, default=0, help="and the next one; 0: any that is free")
    parser.add_argument("--driver", default="lepton_jax.run", help="module to run")
    parser.add_argument("flags", nargs="*", help="of the driver, after --")
    options = parser.parse_args()
    port = options.port or free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(options.devices),
    }
    shared = [
        f"--config.hosts.coordinator=127.0.0.1:{port}",
        f"--config.hosts.count={options.hosts}",
    ]
    command = [sys.executable, "-m", options.driver, *options.flags, *shared]
    processes = [
        subprocess.Popen([*command, f"--config.hosts.index={index}"], env=environment)
        for index in range(options.hosts)
    ]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is theirs: they end in order
    return max(abs(process.wait()) for process in processes)


def free_port() -> int:
    """A port of this machine whose next one is likely to be free too."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
