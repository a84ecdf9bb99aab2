#!/usr/bin/env bash
# Everything from nothing: install, learn weights and a policy on the embedded toy data, compare with the baselines.
source "$(dirname "$0")/setup.sh" figures
"$VENV/bin/python" scripts/compare.py --config configs/quickstart.yaml \
    --methods mixing validation_only one_step curate oracle --seeds 0 --output runs/quickstart_comparison --fresh --exact_match --jobs 2
cat <<TXT

The learned weights are in runs/quickstart_comparison/curate/seed0/weights.parquet, one per training row.
Look at the run:   $VENV/bin/lit-bilevel inspect runs/quickstart_comparison/curate/seed0
Your own data:     $VENV/bin/lit-bilevel fit --config configs/curate.yaml --data.pool P.jsonl --data.validation V.jsonl --data.test T.jsonl --model.policy.path MODEL
TXT
