"""The tuning driver: what parameters are best for a model, this machine and an input.

    python -m lepton_jax.tune --config=configs/tune.py --config.model.path=MODEL \\
        --config.job.input=prompts.jsonl --config.optimizer.max_kl=0.02
    python -m lepton_jax.run --config=configs/tune.py --config.model.path=MODEL \\
        --config.job.input=prompts.jsonl --config.job.output=answers.jsonl

It tries candidates on the first rows of the input and keeps the best as a profile, which `run`
takes from then on for the same model, device, objective and kind of input, where compression is
given as it was here, or left open as it was. Fields that are given in the config file or on the
command line stay as they are. Exit codes: 0 done, 2 the goal can't be met or the set-up failed.
Read next: `optimizer/search.py`.
"""

import sys

from lepton_jax import cli
from lepton_jax.config import RunConfig


def main(config: RunConfig) -> int:
    """One search from its config; the exit code."""
    # Imported here so that --help and mistakes in flags don't wait for jax.
    from lepton_jax.jobs import tuning
    from lepton_jax.optimizer.lepton_optimizer import LeptonOptimizer

    with cli.user_errors(ValueError, OSError):
        config.require_one_model("tune")
        config.require_one_process("tune")
        tuning.require_search(config)
        requests = tuning.sample_requests(config, tuning.load_tokenizer(config))
        optimizer = LeptonOptimizer.of(config)
        with cli.Bars() as bars:
            profile = optimizer.search(
                config, requests, given=cli.given_fields(), progress=bars.show
            )
    print(f"{tuning.table(optimizer.found)}\n\n{optimizer.path_of(profile)}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_driver(main))
