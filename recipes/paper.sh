# The steps that the four recipes of the paper's experiment share. Each recipe sets the numbers of
# its task and then sources this file.
#
# From MODEL a short SFT makes the common start. SFT and RL both go on from it. Then every
# checkpoint is evaluated, and a table beside the paper's numbers and a figure are made.
#
# Settings, as environment variables:
#   MODEL=PATH   the model folder; the paper has Llama-3.2-11B-Vision-Instruct for all four tasks
#   DATA=PATH    V-IRL: the folder with train/ and mini/ (envs.py says what is in them)
#   OUT=PATH     where the runs go [runs/TASK]
#   SEED=0       seed of the runs
#   NPROC=8      number of GPUs; 1 runs plain python
#   SMOKE=1      the same script in a minute or two, on a CPU, in a separate folder. Without MODEL
#                a tiny random-init model stands in, without DATA an invented city. The numbers mean
#                nothing.
#
# Relative paths are relative to the repository. A script that was stopped goes on with the same
# command.
cd "$(dirname "$0")/.."
source recipes/common.sh
OUT=${OUT:-runs/$task${SMOKE:+-smoke${MODEL:+-$(basename "$MODEL")}}}
SEED=${SEED:-0}
[[ $task == *-vl ]] && vision=1 || vision=""
env=("verify_iter=$verify_iter" ${settings:-}) sample=(--max-new-tokens 512)
if [ -n "${SMOKE:-}" ]; then
    NPROC=${NPROC:-1}
    start_steps=3 sft_steps=4 sft_save=2 updates=2 sft_lr=1e-3 rl_lr=1e-4
    small=(--micro-batch-tokens 4096)
    sft=(--batch-size 8)
    rl=(--num-envs 8 --turns-per-env 2 --minibatch-turns 16)
    test=(--episodes 8)
    # A blank model never ends a reply, so its replies are cut sooner.
    [ -n "${MODEL:-}" ] && sample=(--max-new-tokens 64) || sample=(--max-new-tokens 24)
    sample+=(--generate-tokens 4096)
    [ -z "$vision" ] || env+=(resolution=112)
    if [[ $task == virl-* && -z "${DATA:-}" ]]; then
        DATA=$OUT/city
        [ -d "$DATA" ] ||
            python data/synthetic_city.py --out "$DATA" --routes 12 \
                $([ -n "$vision" ] || echo --no-pictures)
    fi
else
    small=(--dtype bfloat16 --gradient-checkpointing)
    # 128 samples are 16 on each of 8 GPUs (official sft/sft_scripts/gp_l.sh). That script asks for
    # a cosine, but its DeepSpeed file overrules it: a warm-up to a constant rate. We read this
    # there and did not run it. How long the run was whose step 400 they took is not known.
    sft=(--batch-size 128 --schedule constant)
    # These are from the official rl/configs.
    rl=(--num-envs 256 --turns-per-env 8 --minibatch-turns 1024 --epochs 4 --clip 0.1
        --temperature 0.2)
    # --paper tests as many episodes as the paper: 234 hands, 48 routes, 18 routes of visual_ood.
    test=(--paper --dtype bfloat16 --max-new-tokens 256)
    [ -n "${MODEL:-}" ] ||
        { echo "set MODEL to a model folder, or SMOKE=1 to see that everything runs" >&2; exit 2; }
fi
check_model
[[ $task != virl-* ]] ||
    env+=("root=${DATA:?set DATA to the folder with train/ and mini/, or SMOKE=1}")
if [ -z "${MODEL:-}" ]; then
    MODEL=$OUT/blank
    [ -d "$MODEL" ] ||
        python support/tiny.py --task "$task" --out "$MODEL" --size 32x2 --env "${env[@]}"
fi
NPROC=${NPROC:-8}
run=(python)
[ "$NPROC" = 1 ] || run=(torchrun --standalone --nproc-per-node "$NPROC")
splits=(id rule_ood)
[ -z "$vision" ] || splits+=(visual_ood)
data=(--task "$task" --env "${env[@]}")
stage() { echo "== $task: $1 ($((SECONDS / 60)) minutes so far)"; }

stage "1 of 6, the common start by SFT, $start_steps steps"
attended "${run[@]}" sft.py --model "$MODEL" --out "$OUT/start" --seed "$SEED" \
    "${data[@]}" "${sft[@]}" "${small[@]}" \
    --steps "$start_steps" --save-every "$start_steps" --lr "$sft_lr"
printf -v start "%s/start/step_%06d" "$OUT" "$start_steps"
stage "2 of 6, SFT goes on from the start, $sft_steps steps"
attended "${run[@]}" sft.py --model "$start" --out "$OUT/sft" --seed "$((SEED + 1))" \
    "${data[@]}" "${sft[@]}" "${small[@]}" \
    --steps "$sft_steps" --save-every "$sft_save" --lr "$sft_lr"
stage "3 of 6, PPO goes on from the start, $updates updates"
attended "${run[@]}" rl.py --model "$start" --out "$OUT/rl" --seed "$SEED" \
    "${data[@]}" "${rl[@]}" "${small[@]}" "${sample[@]}" \
    --updates "$updates" --lr "$rl_lr" --lr-horizon "$lr_horizon"
stage "4 of 6, testing the start and PPO's checkpoints"
attended "${run[@]}" evaluate.py --run-folder "$OUT/rl" \
    --splits "${splits[@]}" "${sample[@]}" "${test[@]}"
stage "5 of 6, testing SFT's checkpoints"
attended "${run[@]}" evaluate.py --run-folder "$OUT/sft" --no-start \
    --splits "${splits[@]}" "${sample[@]}" "${test[@]}"
stage "6 of 6, table, figure and page"
python evaluate.py --compare "$OUT/sft" "$OUT/rl" --figure "$OUT/figure.png" \
    --html "$OUT/report.html"
stage "done; open $OUT/report.html; the results are $OUT/sft/eval.jsonl and $OUT/rl/eval.jsonl"
[ -z "${SMOKE:-}" ] ||
    echo "This was SMOKE=1: a few steps to see that everything runs. Its numbers mean nothing."
