#!/usr/bin/env bash
# launch/slurm.sh PARTITION [overrides]: submits a run or a multirun to Slurm and waits for its table.
#
#   launch/slurm.sh gpu +experiment=merge_deepscaler_deepcoder models.root=/shared/models
#   launch/slurm.sh gpu +experiment=merge_grid hydra.launcher.array_parallelism=4
#   launch/slurm.sh gpu merge=ties,tsv_m merge_scale=0.5,1.0 hydra.launcher.account=NAME
#
# Run it on a login node, in a folder that the compute nodes see under the same path, with the environment that rotrl is
# installed in. Every combination of the overrides becomes one job of a Slurm array; outputs/cache is shared, so that no
# model is evaluated twice, and the same command again continues what a time limit or a node failure cut off. Nodes often
# have no way to the hub: fetch models and data sets first, or give models.root=DIR and evaluation.tasks.<task>.path=DIR.
# Logs: multirun/<name>/.submitit/. More of Slurm's options: hydra.launcher.<option> (timeout_min, account, qos, constraint,
# exclude, additional_parameters); `python -m rotrl launcher=slurm --cfg hydra -p hydra.launcher` lists them.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help || $1 == *=* ]]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0"
  exit 2
fi
partition=$1
shift

command -v srun >/dev/null || { echo "error: no srun on this machine; start it on a login node of the cluster" >&2; exit 2; }
${PYTHON:=python} -c 'import hydra_plugins.hydra_submitit_launcher' 2>/dev/null ||
  { echo "error: hydra-submitit-launcher is missing; pip install 'rotrl[slurm]'" >&2; exit 2; }

exec "$PYTHON" -m rotrl launcher=slurm "hydra.launcher.partition=$partition" "$@"
