# For the *.sbatch files beside it: `run SCRIPT ARGUMENT...` starts a rank a task and, when they
# leave, puts the job back into the queue if it can go on.

GEMOE_SCRIPTS="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "${SLURM_SUBMIT_DIR:?start this with sbatch}" || exit 1
GEMOE_SRUN=()
source "${GEMOE_SITE:-$GEMOE_SCRIPTS/site.sh}" || exit 2
: "${GEMOE_PYTHON:=$GEMOE_SCRIPTS/../../.venv/bin/python}" # of the checkout
: "${GEMOE_MAX_RESTARTS:=50}"

run() {
    # Warnings are for the ranks: they save and leave with 75 (gemoe_ds/errors.py). This shell
    # outlives them to read their code.
    trap : TERM USR1
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    # a rank's end ends the others by itself, and with the same code (gemoe_ds/cluster/watchdog.py);
    # srun, which reports the highest, ends whatever is left after a minute
    srun --wait=60 --kill-on-bad-exit=0 "${GEMOE_SRUN[@]}" "$GEMOE_PYTHON" "$@"
    local code=$? restarts="${SLURM_RESTART_COUNT:-0}"
    case "$code" in
        0 | 1 | 2) exit "$code" ;; # done, a bug, or a mistake: nothing that waiting would heal
    esac
    # 75: asked to stop; others: a rank was lost, and the newest checkpoint is whole
    if [ "$restarts" -lt "$GEMOE_MAX_RESTARTS" ] && scontrol requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID: left with $code, goes back into the queue (restart $((restarts + 1)))"
        sleep 600 # SLURM ends this shell; to leave before would end the job
    fi
    exit "$code"
}
