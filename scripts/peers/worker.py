"""One contender of `compare_peers.py` in its own process: loads, then times a workload whenever it
is asked to.

    python worker.py SPEC     SPEC is a JSON object, see `compare_peers.py`

Each line of stdin is a JSON object {"prompts": [[ids]], "warm_up": bool}; each answer is a line
{"tokens", "seconds", "cpu_seconds"} or {"error"}. After the last line comes {"peak_rss_mb"}.
Libraries that print do so on stderr. This file and the peers beside it run in the peers'
environment and import nothing of ours; `peer_ours.py` and `scoring_ours.py` run in our own.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback

CONTENDERS = {
    "ours": "peer_ours",
    "transformers": "peer_transformers",
    "llama.cpp": "peer_llama_cpp",
    "our scoring": "scoring_ours",
    "transformers scoring": "scoring_transformers",
}


def serve(spec: dict, answers) -> None:
    """Answers requests until stdin ends."""
    module = importlib.import_module(CONTENDERS[spec["engine"]])
    if spec["prepare"]:
        module.prepare(spec)
        return
    contender = module.Contender(spec)
    for line in sys.stdin:
        request = json.loads(line)
        if request["warm_up"]:
            contender.warm_up(request["prompts"])
            answer = {}
        else:
            begun = time.process_time()
            tokens, seconds = contender.run(request["prompts"])
            cpu_seconds = time.process_time() - begun
            answer = {"tokens": tokens, "seconds": seconds, "cpu_seconds": cpu_seconds}
        print(json.dumps(answer), file=answers, flush=True)
    print(json.dumps({"peak_rss_mb": peak_rss_mb()}), file=answers, flush=True)


def peak_rss_mb() -> int:
    """Of this process, in MiB. VmHWM, because ru_maxrss starts at what the parent process had."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        serve(json.loads(sys.argv[1]), answers)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=answers, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
