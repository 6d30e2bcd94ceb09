#!/usr/bin/env bash
# Every experiment of the paper (Su et al., EMNLP 2023): one apet.py command for each experiment, model and task.
#   ./run_grid.sh --list              print the commands, one a line, for xargs, GNU parallel or a SLURM array
#   ./run_grid.sh --gpus 0,1,2,3      run them, four at a time, one GPU each (0+1,2+3: two at a time, two GPUs each)
#   ./run_grid.sh --offline           the study on the toy family (results/toy/PROTOCOL.md): at most two hours on 2 cores
#   ./run_grid.sh --offline --quick   fewer models, tasks and steps: at most 12 minutes on 2 cores
#
#   --experiments, --models, --tasks A,B   some of those in the tables below (default: all)
#   --seeds N   position seeds (default: as in the tables)
#   --jobs N    commands at a time without --gpus (default: 1; offline: the number of cores)
#   --out DIR   results, logs in DIR/logs (default: results/grid; offline: results/offline or results/quick)
# Start the same command again to continue: what is done is skipped, a run that was interrupted goes on where it was. A command
# that fails is named at the end and in the exit status, and stops no other. When this script ends, by kill -9 too, its commands
# end with it (each saves its state once a minute); the next start with the same DIR waits for that. Then: python results/report.py DIR --out DIR
set -euf -o pipefail

fail() { echo "run_grid: error: $1" >&2 && exit 2; }
list="" offline="" quick="" experiments="" models="" tasks="" seeds="" jobs="" gpus="" out=""
while (($#)); do
    case $1 in
    --list | --offline | --quick) printf -v "${1#--}" yes ;;
    --experiments | --models | --tasks | --seeds | --jobs | --gpus | --out)
        [[ -n ${2-} ]] || fail "$1 needs a value"
        printf -v "${1#--}" %s "$2" && shift ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;;
    *) fail "unknown option $1; see --help" ;;
    esac
    shift
done
[[ ${seeds:-1} =~ ^[1-9][0-9]{0,3}$ ]] || fail "--seeds must be a whole number from 1, not '$seeds'"
[[ ${jobs:-1} =~ ^[1-9][0-9]{0,3}$ ]] || fail "--jobs must be a whole number from 1, not '$jobs'"
[[ ${gpus:-0} =~ ^[0-9]+([+,][0-9]+)*$ ]] || fail "--gpus must be like 0,1 or 0+1,2+3, not '$gpus'"
[[ -z $quick || -n $offline ]] || fail "--quick goes with --offline"
[[ -z $out || $out == /* ]] || out=$PWD/$out
cd "$(dirname "$0")"

# Models: name:cost of a step (relative; for the time left). Experiments: name, models (a regular expression; the first row that
# fits counts), position seeds, flags. The random positions to compare "structure" with are in "budget", offline in "position".
if [[ -z $offline ]]; then
    more="" out=${out:-results/grid} jobs=${jobs:-1}
    sizes="bert-small:1 bert-base:4 bert-large:12 t5-v1_1-small:2 t5-v1_1-base:6 t5-v1_1-xxl:200"
    sizes+=" bloom-560m:10 bloom-1b1:20 bloom-7b1:120"
    all_tasks="sst2 imdb rotten_tomatoes mnli qnli rte mrpc qqp samsum multi_news nq_open"
    rows="full    xxl|7b1  - --method full --seed 0,1,2 --device-map auto
        full      .        - --method full --seed 0,1,2
        methods   .        - --method adapter,lora,bitfit,prompt --seed 0,1,2
        position  .       10 --budget adapter,lora,bitfit,prompt --mask random
        budget    .        3 --budget 1e1,1e2,1e3,1e4,1e5,1e6,1e7 --mask random
        structure .        3 --budget 1e4 --mask row,column,block,tensor,magnitude,gradient"
else
    steps=200 more="" # results/toy/PROTOCOL.md
    [[ -z $quick ]] || steps=100 more=" --eval-size 300" out=${out:-results/quick} \
        tasks=${tasks:-toy-inference,toy-qa} models=${models:-toy-tiny,toy-small,toy-base}
    more=" --steps $steps --eval-every $((steps / 2))$more" out=${out:-results/offline} jobs=${jobs:-$(getconf _NPROCESSORS_ONLN)}
    sizes="toy-tiny:2 toy-small:3 toy-base:7 toy-large:16"
    all_tasks="toy-sentiment toy-inference toy-paraphrase toy-qa toy-summary"
    rows="full    .        - --method full --seed 0,1
        methods   .        - --method none,adapter,lora,bitfit,prompt
        position  .        3 --budget lora,bitfit --mask random
        budget    .        2 --budget 1e1,1e2,1e3,adapter,prompt --mask random
        structure toy-base 1 --budget lora --mask row,column,block,tensor,magnitude,gradient"
    export OMP_NUM_THREADS=1 # one thread a command: the same numbers on any number of cores
fi
[[ -z $gpus ]] || more+=" --device cuda" gpus=${gpus//,/ } # else a GPU that is not there would be a CPU
choose() { # of the words $3 those that $2 names with commas between them, or all
    for word in ${2//,/ }; do [[ " $3 " == *" $word "* ]] || fail "unknown $1 '$word'; there are $3"; done
    echo " ${2:-$3} " | tr , ' '
}
models=$(choose model "$models" "$(xargs -n 1 <<<"$sizes" | cut -d : -f 1 | xargs)")
tasks=$(choose task "$tasks" "$all_tasks")
experiments=$(choose experiment "$experiments" "full methods position budget structure")

# The commands, each with its cost and name; to show progress, the cost of a run and what its result file is called.
commands="" results=() groups=() runs=0 total=0
for size in $sizes; do
    model=${size%:*} cost=${size#*:} had=""
    while read -r experiment fits count flags; do
        [[ $models == *" $model "* && $model =~ $fits && $experiments == *" $experiment "* && $had != *$experiment* ]] || continue
        had+=" $experiment" count=${seeds:-$count} n=1
        [[ $flags != --budget* ]] || flags+=" --mask-seed $(seq 0 $((count - 1)) | paste -sd , -)"
        for word in $flags; do commas=${word//[^,]/} n=$((n * (${#commas} + 1))); done
        [[ $flags != *magnitude* ]] || n=$((n - count + 1)) # it has no seed
        name=$(sed -E 's/--method ([^ ]*).*/(\1)/; s/--budget (.*) --mask (.*) --mask-seed (.*)/apet-(\2)-(\1)-p(\3)/' <<<"$flags")
        results+=("$cost ^$model-($(xargs <<<"$tasks" | tr ' ' '|'))-${name//,/|}(-s[^-]*)?-[^-]*\.json$")
        for task in $all_tasks; do
            [[ $tasks == *" $task "* && ! $model-$task =~ ^bert.*-(samsum|multi_news|nq_open)$ ]] || continue # an encoder can't
            commands+="$((n * cost)) $experiment-$model-$task python apet.py --model $model --task $task $flags$more"
            commands+=" --out $(printf %q "$out")"$'\n' runs=$((runs + n)) total=$((total + n * cost))
        done
    done <<<"$rows"
done
[[ -n $commands ]] || fail "no command: an encoder can't write$tasks"
[[ -z $list ]] || { printf %s "$commands" | cut -d ' ' -f 3-; exit; }

command -v python >/dev/null || fail "there is no python: activate the virtual environment"
mkdir -p "$out/logs"
exec 9>"$out/logs/lock" # the commands inherit it: it is locked until the last of them ends
lock() { python -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX$1)" 2>/dev/null; }
lock " | fcntl.LOCK_NB" || { echo "run_grid: waiting for another start with $out" >&2 && lock ""; } || true # not every disk can
state=$(mktemp -d) SECONDS=0
printf %s "$commands" | sort -rn >"$state/list"
touch "$state/ended"
worker() { # with the GPUs $1: the dearest command that no worker has, and so on
    trap 'exit 143' TERM # when the command has ended
    [[ -z $gpus ]] || export CUDA_VISIBLE_DEVICES=${1//+/,}
    while read -r _ name command; do
        mkdir "$state/$name" 2>/dev/null || continue
        log=$out/logs/$name.log status=0
        eval "$command" </dev/null >"$log" 2>&1 || status=$?
        ((status < 129)) || echo "ended by signal $((status - 128))" >>"$log"
        echo "$status $name" >>"$state/ended"
    done <"$state/list"
}
set -m # each worker and its command are a process group of their own
for slot in ${gpus:-$(seq "$jobs")}; do worker "$slot" & groups+=("-$!"); done
set +m
stop() { kill -TERM -- "${groups[@]}" 2>/dev/null || true; }
exec 8> >(trap '' HUP INT TERM; cat; stop; rm -rf "$state") # cat ends when this script does, whatever ends it
trap 'stop; wait "${groups[@]#-}" || true; echo "run_grid: interrupted; the same command continues" >&2; exit 130' HUP INT TERM
progress() { # a run is done when its result is there
    files=$(ls "$out") found=0 spent=0 left="?"
    for result in "${results[@]}"; do
        n=$(grep -cE "${result#* }" <<<"$files") || true
        found=$((found + n)) spent=$((spent + n * ${result%% *}))
    done
    before=${before:-$spent}
    ((spent == before)) || left=$((SECONDS * (total - spent) / (spent - before) / 60))
    n=$(grep -vc '^0 ' "$state/ended") || true
    echo "$found of $runs runs done, $n commands failed, $((SECONDS / 60)) minutes gone, about $left left" >&2
}
while [[ -n $(jobs -rp) ]]; do ((SECONDS % 60)) || progress; sleep 1; done
progress
failed=0
while read -r _ name command; do
    ! grep -qx "0 $name" "$state/ended" || continue
    ((failed++)) || echo "failed; the logs are in $out/logs:" >&2
    printf '  %s\n    %s\n' "$command" "$(tr '\r' '\n' <"$out/logs/$name.log" | grep . | tail -n 1)" >&2
done <"$state/list"
echo "results in $out; tables and figures: python results/report.py $out --out $out"
exit $((failed > 0))
