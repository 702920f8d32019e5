#!/usr/bin/env bash
# All that somebody with a GPU and eight minutes can tell us: the tests on it, speed and how close to the machine, and recipes/gpu.sh in
# its smoke mode. Each part has its own time limit, and none stops the others.
#
#   bash tests/gpu.sh                 writes results/gpu_NAME.md as it goes; with torch 2.11 or later and transformers 5.17 or later
#   DEVICE=cpu bash tests/gpu.sh      the same on a CPU, in small, to see that the script works
#
# OUT=folder for the page and the logs instead of results/ and runs/gpu-check; LIMITS="150 150 90" seconds for the first three parts;
# the rollouts have what is left of TOTAL=460.
cd "$(dirname "$0")/.." || exit 1
export DEVICE=${DEVICE:-cuda}
read -r tests_limit machine_limit recipe_limit <<<"${LIMITS:-150 150 90}"
name=$(python -c "
import os, re, torch
print(re.sub(r'\W+', '_', torch.cuda.get_device_name() if os.environ['DEVICE'] == 'cuda' else 'cpu').strip('_'))") || exit 1
logs=${OUT:-runs/gpu-check} page=${OUT:-results}/gpu_$name.md summary=""
mkdir -p "$logs" "$(dirname "$page")"
part() {     # NAME SECONDS COMMAND...: its output goes to the page, whatever becomes of it
    part=$1 limit=$2 began=$SECONDS
    shift 2
    printf '\n## %s\n\n`%s`\n\n' "$part" "$*" >>"$page"
    timeout -k 10 "$limit" "$@" >"$logs/$part.log" 2>&1
    status=$?
    case $status in
    0) ended=finished ;;
    124 | 137) ended="cut at its limit of $limit s" ;;
    *) ended="failed with status $status" ;;
    esac
    printf '%s, after %s s\n\n' "$ended" $((SECONDS - began)) >>"$page"
    grep '^|' "$logs/$part.log" >>"$page" || { echo '```'; tail -n 12 "$logs/$part.log" | cut -c1-300; echo '```'; } >>"$page"
    summary="$summary $part: $ended ($((SECONDS - began)) s)."
    echo "$part: $ended ($((SECONDS - began)) s)"
}
python - >"$page" <<'PY'
import os, torch, transformers
name = torch.cuda.get_device_name() if os.environ["DEVICE"] == "cuda" else "a CPU, in small"
print(f"# On {name}\n\n`DEVICE={os.environ['DEVICE']} bash tests/gpu.sh`, torch {torch.__version__}, transformers {transformers.__version__}")
PY
rounds=3
[ "$DEVICE" = cuda ] || rounds=1
bench="python tests/bench.py --device $DEVICE --rounds $rounds --force"
part tests "$tests_limit" python -m pytest -q -p no:cacheprovider tests/test_model.py tests/test_families.py tests/test_rl.py tests/test_sft.py \
    tests/test_vision.py
part machine "$machine_limit" $bench --only limits
part recipe "$recipe_limit" env SMOKE=1 SEEDS=0 OUT="$logs/recipe" bash recipes/gpu.sh
left=$((${TOTAL:-460} - SECONDS))
part rollouts $((left > 10 ? left : 10)) $bench --only turns,logprob
printf '\nIn short:%s\n' "$summary" >>"$page"
echo "$page:$summary"
