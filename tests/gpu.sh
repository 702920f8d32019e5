#!/usr/bin/env bash
# What anyone with a GPU and 15 minutes can tell us. The parts are:
#   tests      the tests of models and training, on the GPU
#   tiny       recipes/tiny.sh
#   limits     how close training comes to what the machine can do (tests/bench.py)
#   decode     the same for sampling
#   logprob    speed of log-probs with their gradient, beside a baseline
#   turns      speed of whole rollouts, beside baselines
#   update     two PPO updates of a larger model
#   profile    on what an SFT step and a PPO update of these models spend their time
#   pretrained recipes/pretrained.sh on V-IRL-L, all arms from one start; MODEL names the model
#
#   bash tests/gpu.sh                 writes results/gpu_NAME.md as it goes
#   PARTS="profile pretrained" MODEL=models/smollm2 bash tests/gpu.sh
#   DEVICE=cpu bash tests/gpu.sh      the same on a CPU, in small, to see that the script works
#
# Each part has its time limit, and none stops the others. torch must be 2.11 or later; the tests of
# Qwen-VL need the transformers of requirements.txt.
#
# Settings, as environment variables:
#   DEVICE=cuda        or cpu
#   OUT=folder         where page and logs go [the page to results/, the logs to runs/gpu-check]
#   PARTS="..."        some of the parts above
#   LIMIT=seconds      for each part, in place of its limit below
#   MODEL=folder       the pretrained model [models/smollm2; on a CPU data/base/virl-l]
cd "$(dirname "$0")/.." || exit 1
export DEVICE=${DEVICE:-cuda}
all="tests tiny limits decode logprob turns update profile pretrained"
parts=" ${PARTS:-$all} "
name=$(python -c "
import os, re, torch
name = torch.cuda.get_device_name() if os.environ['DEVICE'] == 'cuda' else 'cpu'
print(re.sub(r'\W+', '_', name).strip('_'))") || exit 1
for part in $parts; do
    [[ " $all " == *" $part "* ]] ||
        { echo "PARTS=$part: allowed are ${all// /, }" >&2; exit 2; }
done
logs=${OUT:-runs/gpu-check} page=${OUT:-results}/gpu_$name.md summary=""
mkdir -p "$logs" "$(dirname "$page")"
# Runs a part and puts the rows of its tables on the page, or else the end of its log, whatever
# becomes of it: NAME SECONDS COMMAND...
part() {
    part=$1 limit=${LIMIT:-$2} began=$SECONDS
    shift 2
    [[ $parts == *" $part "* ]] || return
    printf '\n## %s\n\n`%s`\n\n' "$part" "${shown:-$*}" >>"$page"
    # At its limit a part gets what Ctrl-C sends: pytest then still says what failed.
    timeout -s INT -k 10 "$limit" "$@" >"$logs/$part.log" 2>&1
    status=$?
    case $status in
    0) ended=finished ;;
    124 | 137) ended="cut at its limit of $limit s" ;;
    *) ended="failed with status $status" ;;
    esac
    printf '%s, after %s s\n\n' "$ended" $((SECONDS - began)) >>"$page"
    grep '^|' "$logs/$part.log" >>"$page" ||
        { echo '```'; tail -n 12 "$logs/$part.log" | cut -c1-300; echo '```'; } >>"$page"
    summary="$summary $part: $ended ($((SECONDS - began)) s)."
    echo "$part: $ended ($((SECONDS - began)) s)"
}
# Two updates of a random-init Llama; what metrics.jsonl says of the second, as a table.
update() {
    rm -rf "$logs/blank" "$logs/update"
    python support/tiny.py --task gp-l --out "$logs/blank" --size "$1" &&
        python rl.py --task gp-l --model "$logs/blank" --out "$logs/update" --device "$DEVICE" \
            --updates 2 --save-every 2 $2 &&
        python - "$logs/update/metrics.jsonl" <<'PY'
import json, sys
row = json.loads(open(sys.argv[1]).read().splitlines()[-1])
names = "turns", "response_length", "seconds_rollout", "seconds_update"
print("| of the second update |", " | ".join(names), "|\n|", "--- |" * (len(names) + 1))
print("| |", " | ".join(f"{row[name]:,.1f}" for name in names), "|")
PY
}
python - >"$page" <<'PY'
import os, torch, transformers
device = os.environ["DEVICE"]
name = torch.cuda.get_device_name() if device == "cuda" else "a CPU, in small"
print(f"# On {name}\n\n`DEVICE={device} bash tests/gpu.sh`, torch {torch.__version__}, "
      f"transformers {transformers.__version__}")
PY
rounds=3 tiny="" size=2048x16 model=${MODEL:-models/smollm2}
unset MODEL                                       # recipes/tiny.sh would take it for its start
settings="--num-envs 256 --turns-per-env 2 --minibatch-turns 256 --epochs 4 --max-new-tokens 128"
if [ "$DEVICE" != cuda ]; then
    rounds=1 tiny=SMOKE=1 size=64x2
    [ "$model" != models/smollm2 ] || model=data/base/virl-l
    settings="--num-envs 16 --turns-per-env 2 --minibatch-turns 16 --epochs 1 --max-new-tokens 16"
fi
bench="python tests/bench.py --device $DEVICE --force --rounds"
export -f update
export logs
part tests 150 python -m pytest -q -p no:cacheprovider tests/test_model.py tests/test_families.py \
    tests/test_rl.py tests/test_sft.py tests/test_vision.py tests/test_qwen_vl.py
part tiny 200 env JOBS=3 $tiny OUT="$logs/tiny" bash recipes/tiny.sh
part limits 150 $bench $rounds --only limits
part decode 100 $bench $rounds --only decode
part logprob 120 $bench $rounds --only logprob
part turns 200 $bench 1 --only turns
shown="update $size $settings"
part update 180 bash -c 'update "$@"' update $size "$settings"
unset shown
part profile 120 $bench 1 --only limits --profile
part pretrained 420 env KINDS=family $tiny MODEL="$model" OUT="$logs/pretrained" \
    bash recipes/pretrained.sh
printf '\nIn short:%s\n' "$summary" >>"$page"
echo "$page:$summary"
