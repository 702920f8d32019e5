#!/usr/bin/env bash
# Evaluates a checkpoint that was released with the paper, or one that its code trained. Prompts,
# verdicts and decoding are the official ones, and the results stand beside the paper's numbers.
#
#   git clone https://github.com/LeslieTrue/SFTvsRL
#   MODEL=GP-L-Init TASK=gp-l REPO=SFTvsRL bash recipes/official.sh
#   MODEL=VIRL-L-Init TASK=virl-l REPO=SFTvsRL DATA=VIRL_routes bash recipes/official.sh
#   SMOKE=1 TASK=gp-l REPO=SFTvsRL bash recipes/official.sh
#
# Settings, as environment variables:
#   MODEL=PATH   the model folder
#   TASK=gp-l    or gp-vl, virl-l, virl-vl
#   REPO=PATH    your copy of the official code: prompts and verdicts come from there, and the
#                pictures of cards for gp-vl
#   DATA=PATH    V-IRL: the folder with nyc_1k_routes/ and VLN_mini/
#   OUT=PATH     where the prompt files go [runs/official]
#   SEEDS=0      seeds of the episodes, comma-separated
#   NPROC=1      number of GPUs
#   SMOKE=1      on a CPU. Without MODEL a tiny random-init model stands in, without DATA an
#                invented city. The numbers mean nothing.
#
# Relative paths are relative to the repository. docs/official.md says more, and docs/differences.md
# what still differs from the official evaluation.
set -euo pipefail
cd "$(dirname "$0")/.."
TASK=${TASK:?set TASK to gp-l, gp-vl, virl-l or virl-vl}
REPO=${REPO:?set REPO to a copy of github.com/LeslieTrue/SFTvsRL}
OUT=${OUT:-runs/official${SMOKE:+-smoke}}
[[ $TASK == *-vl ]] && vision=1 || vision=""
splits=(id rule_ood ${vision:+visual_ood})
python data/official_prompts.py --repo "$REPO" --out "$OUT"
env=("prompt_file=$OUT/$TASK.json") test=(--dtype bfloat16 --max-new-tokens 256)
case $TASK in
    gp-vl) env+=("card_dir=$REPO/gym/gym_cards/envs/img") ;;
    virl-*) env+=(turn_words=unwrapped) ;;
esac
if [ -n "${SMOKE:-}" ]; then
    test=(--max-new-tokens 8 --generate-tokens 4096)
    if [[ $TASK == virl-* && -z "${DATA:-}" ]]; then
        DATA=$OUT/city-$TASK
        [ -d "$DATA" ] ||
            python data/synthetic_city.py --out "$DATA" --routes 12 \
                $([ -n "$vision" ] || echo --no-pictures)
    fi
fi
[[ $TASK != virl-* ]] ||
    env+=("root=${DATA:?set DATA to the folder with nyc_1k_routes/ and VLN_mini/, or SMOKE=1}")
[ "$TASK" != virl-vl ] ||
    env+=(view_headings=official "resolution=$([ -n "${SMOKE:-}" ] && echo 56 || echo 560)")
[ "$TASK" != gp-vl ] || [ -z "${SMOKE:-}" ] || env+=(resolution=112)
if [ -n "${SMOKE:-}" ] && [ -z "${MODEL:-}" ]; then
    MODEL=$OUT/blank-$TASK
    # A blank model does without the prompt file, which is the first of the settings.
    [ -d "$MODEL" ] ||
        python support/tiny.py --task "$TASK" --out "$MODEL" --size 32x2 \
            ${env[1]+--env "${env[@]:1}"}
fi
[ -f "${MODEL:?set MODEL to a model folder, or SMOKE=1}/config.json" ] ||
    { echo "MODEL=$MODEL: no such model folder (it would have a config.json)" >&2; exit 2; }
# The official code sets only the length of a reply. So a checkpoint decodes as its
# generation_config.json says: a stock Llama-3.2 at temperature 0.6, top-p 0.9. Only top-k, which
# transformers sets to 50 where the file does not, is left out.
sample=$(python - "$MODEL/generation_config.json" <<'PY'
import json, pathlib, sys
path = pathlib.Path(sys.argv[1])
says = json.loads(path.read_text()) if path.is_file() else {}
temperature, top_p = 0.0, 1.0                          # greedy
if says.get("do_sample"):
    temperature = says.get("temperature") or 1.0
    top_p = says.get("top_p") or 1.0
    top_k = says.get("top_k", 50)
    if top_k:
        print(f"top-k {top_k} of {path} is left out: evaluate.py has none", file=sys.stderr)
print("--temperature", temperature, "--top-p", top_p)
PY
)
echo "== $TASK: $MODEL, decoded with $sample"
run=(python)
[ "${NPROC:-1}" = 1 ] || run=(torchrun --standalone --nproc-per-node "$NPROC")
"${run[@]}" evaluate.py --model "$MODEL" --task "$TASK" --splits "${splits[@]}" \
    --env "${env[@]}" --paper --seeds "${SEEDS:-0}" $sample "${test[@]}"
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a tiny model to see that everything runs. Its numbers mean nothing."
