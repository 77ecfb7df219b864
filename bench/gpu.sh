#!/usr/bin/env bash
# Everything about one GPU in one command: correctness, the suite at full size beside PyTorch, and where the limits are.
#
# On a machine with Rust, make a folder with all that a run needs (about 200 MB, of which 32 are fixtures; no toolkit):
#     bench/gpu.sh pack gpu-run
# Copy it to a machine with a driver. CUDA needs NVRTC and the CUDA headers beside the driver, as `ltxc doctor` says: a
# toolkit, or the wheels nvidia-cuda-nvrtc and nvidia-cuda-runtime with LD_LIBRARY_PATH and CUDA_PATH set. PyTorch is
# optional; ltx-core is not needed. There:
#     gpu-run/gpu.sh run --device cuda:0 --seconds 480 --out results --python python3
# The most valuable part comes first, and every part writes what it has as it goes: a run that is cut short keeps the
# rest. `--device vulkan:0 --size 64x128x9 --divisor 4` tries it on software Vulkan.
set -euo pipefail

usage() {
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

pack() {
    local folder=$1 root
    root=$(cd "$(dirname "$0")/.." && pwd)
    mkdir -p "$folder/bin"
    folder=$(cd "$folder" && pwd)
    cd "$root"
    # The same features for both, so that everything is built once.
    local build=(--release --locked --workspace --features ltxc-bench/cubek)
    cargo build "${build[@]}" --bin ltxc --bin ltxc-bench
    install target/release/ltxc target/release/ltxc-bench "$folder/bin"
    local tests
    tests=$(cargo test "${build[@]}" --test cube --test parity --no-run 2>&1)
    # `Executable tests/cube/main.rs (target/release/deps/cube-0123456789abcdef)`
    binary() { sed -n "s,^ *Executable .*(\\(.*/$1-[0-9a-f]*\\))\$,\\1,p" <<<"$tests"; }
    install "$(binary cube)" "$folder/bin/kernel-tests"
    install "$(binary parity)" "$folder/bin/parity-tests"
    if command -v strip >/dev/null; then strip "$folder"/bin/*; fi
    rm -rf "$folder/pytorch" "$folder/fixtures"
    cp -r bench/pytorch "$folder/pytorch"
    cp -r tests/fixtures "$folder/fixtures"
    install bench/gpu.sh "$folder/gpu.sh"
    du -sh "$folder"
}

run() {
    local device=cuda:0 seconds=480 out=results python='' size=512x768x121 large=1088x1920x121 divisor=1
    while [ $# -gt 0 ]; do
        [ $# -gt 1 ] || usage
        case $1 in
            --device) device=$2 ;;
            --seconds) seconds=$2 ;;
            --out) out=$2 ;;
            --python) python=$2 ;;
            # Another size than the two full ones: then only that one is measured.
            --size) size=$2 large='' ;;
            --divisor) divisor=$2 ;;
            *) usage ;;
        esac
        shift 2
    done
    local here start
    here=$(cd "$(dirname "$0")" && pwd)
    start=$(date +%s)
    mkdir -p "$out"
    local log="$out/summary.md"
    # shellcheck disable=SC2016 # backticks of Markdown
    printf '# GPU run, %s, device `%s`, %s s\n\n| part | result | s |\n| --- | --- | --- |\n' \
        "$(date -u +%F)" "$device" "$seconds" >"$log"
    export LTXC_FIXTURES="$here/fixtures" LTXC_TEST_DEVICE="$device" LTXC_REQUIRE_VULKAN=1 NODEVICE_SELECT=1

    local failed=0
    # part NAME PERCENT COMMAND...: runs within that part of the time, and within what is left of all.
    part() {
        local name=$1 limit=$((seconds * $2 / 100)) begin left status=ok
        shift 2
        begin=$(date +%s)
        left=$((start + seconds - begin))
        [ "$limit" -lt "$left" ] || limit=$left
        if [ "$limit" -lt 5 ]; then
            printf '| %s | left out for time | 0 |\n' "$name" >>"$log"
            return 0
        fi
        echo "== $name, at most $limit s" >&2
        # Starting and ceilings come before what LIMIT is for, and the last measurement may end behind it.
        timeout --kill-after=5 "$limit" "${@//LIMIT/$((limit * 4 / 5))}" >"$out/$name.log" 2>&1 || status="exit $?"
        case $status in
            ok) ;;
            'exit 124' | 'exit 137') status='cut off' ;;
            *) failed=1 ;;
        esac
        printf '| %s | %s | %s |\n' "$name" "$status" "$(($(date +%s) - begin))" >>"$log"
        tail -n 3 "$out/$name.log" >&2
    }
    local suite=("$here/bin/ltxc-bench" --save "$out" --scripts "$here/pytorch")
    if [ -n "$python" ] && "$python" -c 'import torch' 2>/dev/null; then
        suite+=(--python "$(command -v "$python")")
    fi
    suite+=(suite --device "$device" --divisor "$divisor" --seconds LIMIT)

    { nvidia-smi || true; "$here/bin/ltxc" doctor; } >"$out/machine.log" 2>&1 || true
    part parity 20 "$here/bin/parity-tests" distilled_runs_on_a_gpu --nocapture
    part "suite-$size-bf16" 35 "${suite[@]}" --size "$size" --bf16
    part kernel-tests 25 "$here/bin/kernel-tests"
    [ -z "$large" ] || part "suite-$large-bf16" 20 "${suite[@]}" --size "$large" --bf16
    part cubek 10 "$here/bin/ltxc-bench" --save "$out" cubek --device "$device"
    part "suite-$size-f32" 15 "${suite[@]}" --size "$size" --kernels 0.3
    case $device in
        cuda:*)
            if grep -q ' vulkan:0: .* of its own' "$out/machine.log"; then
                LTXC_TEST_DEVICE=vulkan:0 part parity-vulkan 10 "$here/bin/parity-tests" distilled_runs_on_a_gpu
                LTXC_TEST_DEVICE=vulkan:0 part kernel-tests-vulkan 15 "$here/bin/kernel-tests"
            else
                printf '| vulkan | the driver does not offer it | 0 |\n' >>"$log"
            fi
            ;;
    esac
    cat "$log"
    return $failed
}

[ $# -ge 1 ] || usage
mode=$1
shift
case $mode in
    pack) [ $# -eq 1 ] || usage; pack "$1" ;;
    run) run "$@" ;;
    *) usage ;;
esac
