#!/usr/bin/env bash
# All that needs a GPU, in ten minutes: the tests marked `gpu`, then the benchmarks against Lightning, TRL and the plain
# loop. Writes one file of results, also where a part fails or takes too long; a later part does not wait for it.
#
#   scripts/gpu.sh [OUT.md]                             PYTHON chooses the interpreter; MINUTES how long it may take
#   ACCELERATOR=cpu MINUTES=30 scripts/gpu.sh OUT.md    tries the script itself, with small settings
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} out=$(realpath -m "${1:-gpu.md}") accelerator=${ACCELERATOR:-gpu}
minutes=${MINUTES:-10}
end=$((SECONDS + 60 * minutes - 15))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
small=()
[ "$accelerator" = cpu ] && small=(--rounds 1 --steps 2)

part() { # part SECONDS COMMAND …: run it for so long at most, of ten minutes in all, and write down what it printed
    local limit=$(($1 * minutes / 10)) left=$((end - SECONDS)) begun=$SECONDS status
    shift
    if ((left < 20)); then
        printf '\n## `%s`\n\nnot run: the time was up\n' "$*" >> "$out"
        return
    fi
    ((limit > left)) && limit=$left
    echo "== $* (at most $limit s)"
    timeout --signal=INT --kill-after=40 "$limit" "$@" > "$out.part" 2>&1
    status=$?
    {
        printf '\n## `%s`\n\nstatus %s, %s s\n\n```\n' "${*/$python/python}" "$status" "$((SECONDS - begun))"
        grep -vE '^\s*$|Warning|warn|it/s\]' "$out.part" | tail -60
        printf '```\n'
    } >> "$out"
    rm -f "$out.part"
}

{
    echo "# Results on $(date -I)"
    echo
    echo '```'
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo "no GPU"
    git log -1 --format='commit %h %s' 2> /dev/null
    "$python" -c 'if True:
        import platform
        from importlib.metadata import PackageNotFoundError, version
        print("python", platform.python_version())
        for name in ("torch", "lightning", "transformers", "peft", "trl", "flash_attn", "bitsandbytes", "deepspeed"):
            try:
                print(name, version(name))
            except PackageNotFoundError:
                print(name, "is not installed")'
    echo '```'
} > "$out"

# the tests run beside nothing else; what is timed comes after them
part 260 "$python" -m pytest -v -rs -m gpu --accelerator "$accelerator" --seconds $((20 * minutes)) tests/test_gpu.py
benchmark=("$python" scripts/benchmark.py)
part 100 "${benchmark[@]}" step --accelerator "$accelerator" "${small[@]}"
part 60 "${benchmark[@]}" step --accelerator "$accelerator" --lora "${small[@]}"
part 80 "${benchmark[@]}" step --accelerator "$accelerator" --compile --only one_step "${small[@]}"
if [ "$accelerator" = gpu ]; then
    part 30 "${benchmark[@]}" memory --accelerator gpu --dtype bfloat16 --rows 16 --tokens 1024 --hidden 2048
    part 60 "${benchmark[@]}" generate --device cuda --prompts 128 --new 64
else
    part 60 "${benchmark[@]}" memory --repeats 1
    part 60 "${benchmark[@]}" generate --prompts 8 --new 8 --repeats 1
fi
part 60 "${benchmark[@]}" weights --rows 1000 1000000 --steps 50
echo "written to $out"
