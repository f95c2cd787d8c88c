#!/usr/bin/env bash
# Runs one command on all hosts of a TPU VM slice at once: the same program, one mesh.
# See --help. Host 0 writes the output; a rerun goes on where a killed one stopped.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: scripts/launch_tpu_pod.sh TPU ZONE FOLDER -- FLAGS OF lepton_jax.run

  TPU     name of the TPU VM, as in gcloud compute tpus tpu-vm list
  ZONE    its zone
  FOLDER  the checkout on every host, with its .venv (scripts/quickstart.sh makes it; then on every
          host, in FOLDER: .venv/bin/pip install 'jax[tpu]' -e '.[remote,hub]' gcsfs, where remote
          and gcsfs are for gs://, hub for hf:org/name)

Adds --config.hosts.coordinator=auto; mesh.model must be the number of chips of the slice, and
every host must be able to read job.input (gs:// or a path on a shared disk) and model.path (a path
on a shared disk, or hf:org/name).

  scripts/launch_tpu_pod.sh my-v5e-16 us-west4-a '~/lepton_jax' -- --config=configs/quickstart.py \
      --config.mesh.model=16 --config.job.input=gs://bucket/in.jsonl \
      --config.job.output=gs://bucket/out.jsonl

PROJECT=... in the environment chooses a Google Cloud project, DRY_RUN=1 prints the command.
HELP
}

if [[ "${1:-}" == "--help" || "${1:-}" == "-h" ]]; then
    usage
    exit 0
fi
if [[ $# -lt 5 || "${4:-}" != "--" ]]; then
    usage >&2
    exit 2
fi
tpu=$1 zone=$2 folder=$3
shift 4
printf -v flags ' %q' "$@"
# The folder is expanded on the hosts, where ~ is another one.
remote="cd $folder && .venv/bin/python -m lepton_jax.run$flags --config.hosts.coordinator=auto"
command=(gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker=all --command="$remote")
if [[ -n "${PROJECT:-}" ]]; then
    command+=(--project="$PROJECT")
fi
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
