#!/usr/bin/env bash
# The tables on real text in .assets/results. Stopped and called again, it goes on where it was.
#
#   scripts/evidence.sh DATA MODEL OUT [quality|arith|others|safety|full ...]
#
# DATA has the folders quality, math and safety, each file as jsonl (pool, validation, test, truth); MODEL is a
# from_pretrained folder; OUT gets a folder a table. It takes some hours on two cores with a model of 4M parameters.
set -euo pipefail
data=$1 model=$2 out=$3
shift 3
python=${PYTHON:-python}
phases='[{"name":"pool","share":0.1,"learn_weights":false,"prepare_solver":true},{"name":"weights","share":0.9}]'
budget=(--subset 2000 --max_steps 200 --model.upper_weight 0.25 --model.phases "$phases")
core=(mixing value_function@sigmoid weighted:contrast_375 oracle validation_only perplexity_difference mixing@0.1 mixing@0.5
    best:mixing,mixing@0.1,mixing@0.5)
others=(pool_only constant_mixing random lowest_loss highest_loss ngram_importance gradient_similarity seal
    one_step@sigmoid one_step@softmax one_step@network penalty@sigmoid value_function@softmax
    value_function@network bmo two_stage:value_function@sigmoid weighted:value_function@sigmoid)

compare() { # compare TABLE PREFIX_OF_FILES OPTIONS...
    local table=$1 files=$2
    shift 2
    "$python" scripts/compare.py --config configs/quality.yaml --model.policy.path "$model" --output "$out/$table" \
        --data.pool "$data/${files}pool.jsonl" --data.validation "$data/${files}validation.jsonl" \
        --data.test "$data/${files}test.jsonl" --data.truth "$data/${files}truth.jsonl" --variants scripts/variants.yaml "$@"
}

(($#)) || set -- quality arith others safety full
for table in "$@"; do
    case $table in
    quality) compare quality quality/ --methods "${core[@]}" --seeds 0 1 2 "${budget[@]}" ;;
    arith) compare arith math/arith_ --methods "${core[@]}" --seeds 0 1 2 "${budget[@]}" ;;
    safety) compare safety safety/ --methods "${core[@]}" --answers --model.max_new_tokens 48 "${budget[@]}" ;;
    others)
        mapfile -t ablations < <(sed -n '/^# What follows/,$s/^\([A-Za-z_0-9.]*\): .*/\1/p' scripts/variants.yaml)
        compare others math/arith_ --methods mixing oracle value_function@sigmoid "${others[@]}" "${ablations[@]}" "${budget[@]}"
        ;;
    full) compare full quality/ --methods mixing one_step weighted:contrast oracle validation_only ;;
    esac
done
