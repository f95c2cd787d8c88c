"""The planning driver: what a model needs and how fast it can be, before a device is rented.

    python -m lepton_jax.plan --config=configs/llama3_70b.py --topology=v5e:2x4
    python -m lepton_jax.plan --config=configs/llama3_70b.py --search --config.plan.target=2000
    python -m lepton_jax.plan --config=configs/llama3_70b.py --json --html=plan.html

No weights are needed, and for a TPU no TPU: pip install libtpu. Without a topology it plans for the
device at hand. Exit codes: 0 it fits, 1 it doesn't, 2 there is nothing to plan. Read next:
`planning/plan.py`.
"""

import dataclasses
import json
import sys
from pathlib import Path

from absl import flags

from lepton_jax import cli
from lepton_jax.config import RunConfig
from lepton_jax.whole_file import write_whole

_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice, such as v5e:2x4; see plan.topology")
_SEARCH = flags.DEFINE_bool("search", False, "the smallest slices that serve the model")
_JSON = flags.DEFINE_bool("json", False, "print the plan as JSON, the same for the same input")
_HTML = flags.DEFINE_string("html", "", "also write a page to this file")


def main(config: RunConfig) -> int:
    """One plan, or a search; the exit code."""
    # Imported here so that --help and mistakes in flags don't wait for jax.
    from lepton_jax.planning import report, search
    from lepton_jax.planning.plan import make_plan

    if _TOPOLOGY.value:
        section = dataclasses.replace(config.plan, topology=_TOPOLOGY.value)
        config = dataclasses.replace(config, plan=section)
    with cli.user_errors(ValueError, OSError):
        config.require_one_model("plan")
        if _SEARCH.value:
            if _HTML.value:
                raise ValueError(f"--html={_HTML.value}: a search has no page; leave it out")
            found = search.search(config)
            print(_json(search.as_json(found)) if _JSON.value else search.as_text(found))
            return 0
        plan = make_plan(config)
        if _HTML.value:
            write_whole(Path(_HTML.value), report.page(plan))
    print(_json(report.as_json(plan)) if _JSON.value else report.text(plan))
    return 0 if plan.fits else 1


def _json(data: object) -> str:
    return json.dumps(data, indent=1, sort_keys=True)


if __name__ == "__main__":
    sys.exit(cli.run_driver(main))
