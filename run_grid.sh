#!/usr/bin/env bash
# Every experiment of the paper (Su et al., EMNLP 2023): one apet.py command for each experiment, model and task.
#
#   ./run_grid.sh --list              print the commands, one a line, for xargs, GNU parallel or a SLURM array
#   ./run_grid.sh --gpus 0,1,2,3      run them, four at a time, one GPU each (0+1,2+3: two at a time, two GPUs each)
#   ./run_grid.sh --offline           the study on the toy family, on a CPU: at most two hours on 2 cores
#   ./run_grid.sh --offline --quick   fewer models, tasks, seeds and steps: at most 12 minutes on 2 cores
#
#   --experiments A,B   of full, methods, position, budget, structure (default: all)
#   --models A,B        (default: all of the table below)
#   --tasks A,B         (default: all)
#   --seeds N           position seeds (default: 10 for position, 3 for budget and structure; offline 5, 2, 1)
#   --jobs N            commands at a time without --gpus (default: 1; offline: the number of cores)
#   --out DIR           results, logs in DIR/logs (default: results/grid; offline: results/offline)
#
# Start the same command again to continue: what is done is skipped, a run that was interrupted goes on where it was. A command
# that fails is named at the end and in the exit status, and stops no other. Then: python results/report.py DIR --out DIR
set -euo pipefail

# Models: name, cost of a step (relative; for the time left), exponent of the largest budget.
paper="bert-small:1:7 bert-base:4:7 bert-large:12:7 t5-v1_1-small:2:7 t5-v1_1-base:6:7 t5-v1_1-xxl:200:7
bloom-560m:10:7 bloom-1b1:20:7 bloom-7b1:120:7"
toy="toy-tiny:2:4 toy-small:3:5 toy-base:8:5 toy-large:20:5"
paper_tasks="sst2 imdb rotten_tomatoes mnli qnli rte mrpc qqp samsum multi_news nq_open"
toy_tasks="toy-sentiment toy-inference toy-paraphrase toy-qa toy-summary"
written="samsum multi_news nq_open" # an encoder can't

# Options.
experiments="full methods position budget structure"
models="" tasks="" seeds="" jobs="" gpus="" out="" list="" offline="" quick="" more=""
fail() {
    echo "run_grid: error: $1" >&2
    exit 2
}
number() {
    [[ $2 =~ ^[1-9][0-9]{0,3}$ ]] || fail "$1 must be a whole number from 1, not '$2'"
    echo "$2"
}
while (($#)); do
    case $1 in
    --list) list=yes ;;
    --offline) offline=yes ;;
    --quick) quick=yes ;;
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
        exit
        ;;
    --experiments | --models | --tasks | --seeds | --jobs | --gpus | --out)
        (($# > 1)) || fail "$1 needs a value"
        case $1 in
        --experiments) experiments=${2//,/ } ;;
        --models) models=${2//,/ } ;;
        --tasks) tasks=${2//,/ } ;;
        --seeds) seeds=$(number "$1" "$2") ;;
        --jobs) jobs=$(number "$1" "$2") ;;
        --gpus) gpus=${2//,/ } ;;
        --out) out=$2 ;;
        esac
        shift
        ;;
    *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
[[ -z $quick || -n $offline ]] || fail "--quick goes with --offline"
for slot in $gpus; do [[ $slot =~ ^[0-9]+(\+[0-9]+)*$ ]] || fail "--gpus must be like 0,1 or 0+1,2+3, not '$slot'"; done
[[ -z $out || $out == /* ]] || out=$PWD/$out
cd "$(dirname "$0")"
if [[ -n $offline ]]; then
    table=$toy known_tasks=$toy_tasks out=${out:-results/offline} jobs=${jobs:-$(getconf _NPROCESSORS_ONLN)}
    export OMP_NUM_THREADS=1 # one thread a command: the same numbers on any number of cores
    more=" --steps 200 --eval-every 100"
else
    table=$paper known_tasks=$paper_tasks out=${out:-results/grid} jobs=${jobs:-1}
fi
[[ -z $gpus ]] || more+=" --device cuda" # else a GPU that is not there would be a CPU
if [[ -n $quick ]]; then
    models=${models:-toy-tiny toy-small toy-base} tasks=${tasks:-toy-sentiment toy-qa} seeds=${seeds:-2}
    more=" --steps 100 --eval-every 50 --eval-size 300"
fi
known_models=$(for row in $table; do echo "${row%%:*}"; done)
among() { # every word of $2 is in $3, or the script ends
    for word in $2; do
        [[ " ${3//$'\n'/ } " == *" $word "* ]] || fail "unknown $1 '$word'; there are ${3//$'\n'/ }"
    done
}
models=${models:-$known_models} tasks=${tasks:-$known_tasks}
among experiment "$experiments" "full methods position budget structure"
among model "$models" "$known_models"
among task "$tasks" "$known_tasks"

# The commands.
upto() { # 0,1,... below $1
    printf 0
    for ((e = 1; e < $1; e++)); do printf ',%d' "$e"; done
}
ten_to() { # 1e1,1e2,... up to 1e$1
    printf '1e1'
    for ((e = 2; e <= $1; e++)); do printf ',1e%d' "$e"; done
}
masks="--budget 1e4 --mask row,column,block,tensor,magnitude,gradient" # random 1e4 is in "budget", offline in "position"
flags() { # of experiment $1 for a model whose largest budget is 1e$2
    case ${offline:-paper}-$1 in
    paper-full) echo "--method full --seed 0,1,2" ;;
    paper-methods) echo "--method adapter,lora,bitfit,prompt --seed 0,1,2" ;;
    paper-position) echo "--budget adapter,lora,bitfit,prompt --mask-seed $(upto "${seeds:-10}")" ;;
    paper-budget) echo "--budget $(ten_to "$2") --mask-seed $(upto "${seeds:-3}")" ;;
    paper-structure) echo "$masks --mask-seed $(upto "${seeds:-3}")" ;;
    yes-full) echo "--method full --seed 0,1" ;;
    yes-methods) echo "--method adapter,lora,bitfit,prompt" ;;
    yes-position) echo "--budget 1e3,1e4 --mask-seed $(upto "${seeds:-5}")" ;; # on the toy, PET's own budgets lie around 1e4
    yes-budget) echo "--budget 1e1,1e2$( (($2 < 5)) || echo ,1e5) --mask-seed $(upto "${seeds:-2}")" ;; # the others are in "position"
    yes-structure) echo "$masks --mask-seed $(upto "${seeds:-1}")" ;;
    esac
}

commands=() labels=() costs=()
for model in $models; do
    for row in $table; do
        IFS=: read -r name cost largest <<<"$row"
        [[ $name == "$model" ]] || continue
        for task in $tasks; do
            [[ $model != bert-* || " $written " != *" $task "* ]] || continue
            for experiment in $experiments; do
                [[ -z $offline || $experiment != structure || $model == toy-base ]] || continue
                chosen=$(flags "$experiment" "$largest")
                # 16 bytes a parameter do not fit one GPU
                [[ $experiment != full || ($model != *-xxl && $model != *-7b1) ]] || chosen+=" --device-map auto"
                runs=1
                for word in $chosen; do
                    commas=${word//[^,]/}
                    runs=$((runs * (${#commas} + 1)))
                done
                [[ $experiment != structure ]] || runs=$((runs - runs / 6 + 1)) # magnitude has no seed
                commands+=("python apet.py --model $model --task $task $chosen$more --out $(printf %q "$out")")
                labels+=("$experiment-$model-$task")
                costs+=("$((runs * cost)) $runs")
            done
        done
    done
done
((${#commands[@]})) || fail "no command: an encoder can't write $tasks"
if [[ -n $list ]]; then
    printf '%s\n' "${commands[@]}"
    exit
fi

command -v python >/dev/null || fail "there is no python: activate the virtual environment"
# Run them, the dearest first; a command belongs to the worker that makes its folder in $claims.
mkdir -p "$out/logs"
claims=$(mktemp -d)
order=$(for i in "${!commands[@]}"; do echo "${costs[i]} $i"; done | sort -k1,1nr -k3,3n | cut -d' ' -f3)
worker() { # with the GPUs $1
    local child="" i status
    trap 'kill -TERM "$child" 2>/dev/null; wait "$child"; exit 143' TERM INT # apet.py saves its state
    for i in $order; do
        mkdir "$claims/$i" 2>/dev/null || continue
        [[ -z $1 ]] || export CUDA_VISIBLE_DEVICES=${1//+/,}
        eval "exec ${commands[i]}" >"$out/logs/${labels[i]}.log" 2>&1 &
        child=$!
        status=0
        wait "$child" || status=$?
        ((status == 0)) || echo "$i" >>"$claims/failed"
    done
}
workers=()
for slot in ${gpus:-$(for ((j = 0; j < jobs; j++)); do echo -; done)}; do
    worker "${slot#-}" &
    workers+=($!)
done
# shellcheck disable=SC2329 # a trap calls it
stop() {
    kill -TERM "${workers[@]}" 2>/dev/null
    wait
    rm -rf "$claims"
    printf '\nrun_grid: interrupted; the same command continues\n' >&2
    exit 130
}
trap stop INT TERM

total=0 cells=0 before=-1
for cost in "${costs[@]}"; do total=$((total + ${cost% *})) cells=$((cells + ${cost#* })); done
progress() { # one line; a run counts once its result is there
    local gone=$SECONDS spent=0 found=0 failed=0 left="time left not known yet" model task row files cost
    for model in $models; do
        for row in $table; do [[ ${row%%:*} != "$model" ]] || cost=$(cut -d: -f2 <<<"$row"); done
        for task in $tasks; do
            files=("$out/$model-$task-"*.json)
            [[ ! -e ${files[0]} ]] || found=$((found + ${#files[@]})) spent=$((spent + cost * ${#files[@]}))
        done
    done
    ((before >= 0)) || before=$spent
    ((spent == before)) || left=$(awk -v s="$gone" -v a="$((total - spent))" -v b="$((spent - before))" \
        'BEGIN { t = a > 0 ? s * a / b / 60 : 0; printf "about %d:%02d h left", t / 60, t % 60 }')
    [[ ! -e $claims/failed ]] || failed=$(wc -l <"$claims/failed")
    printf '%s%d of %d runs done, %d commands failed, %d:%02d h gone, %s' "$1" "$found" "$cells" "$failed" \
        $((gone / 3600)) $((gone / 60 % 60)) "$left" >&2
    [[ -n $1 ]] || echo >&2
}
begin="" every=60 # a file gets a line a minute, a terminal one line that changes
[[ ! -t 2 ]] || begin=$'\r\e[K' every=2
shown=-$every
while [[ -n $(jobs -rp) ]]; do
    ((SECONDS - shown < every)) || { progress "$begin" && shown=$SECONDS; }
    sleep 1
done
progress "$begin"
[[ -z $begin ]] || echo >&2
status=0
if [[ -e $claims/failed ]]; then
    status=1
    echo "failed; the logs are in $out/logs:" >&2
    while read -r i; do
        printf '  %s\n    %s\n' "${commands[i]}" "$(tr '\r' '\n' <"$out/logs/${labels[i]}.log" | grep . | tail -n 1)" >&2
    done <"$claims/failed"
fi
rm -rf "$claims"
echo "results in $out; tables and figures: python results/report.py $out --out $out"
exit $status
