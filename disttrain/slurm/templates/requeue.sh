
# The rank that saved has requeued the job, or asks for it in RUN_DIR/requeue (no scontrol in a container, say).
# Ranks that were told before they could save anything ended by the signal: 143, or 138, or a preemption is noted.
# Another attempt of this job may run elsewhere if this node was cut off: the count of restarts tells.
restart=${SLURM_RESTART_COUNT:-0}
job() { scontrol -o show job "$JOB" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
mine() { [ "$(job JobState)" = RUNNING ] && [ "$(job Restarts)" = "$restart" ]; }
asked() {
  [ "$(cat "$RUN_DIR/requeue" 2>/dev/null)" = "$JOB $restart" ] || [ "$code" = 143 ] || [ "$code" = 138 ] ||
    case $(job PreemptTime) in "" | None) false ;; esac
}
answers() { timeout 60 srun --overlap --ntasks-per-node=1 true 2>/dev/null; }
if [ "$code" -ne 0 ] && [ "$restart" -lt {{max_requeues}} ]; then
  if mine && ! asked && ! answers; then
    # A node died, and its ranks' peers ended first: SLURM sees it in a while, and starts the job on other nodes.
    echo "disttrain: a node does not answer; waiting for SLURM to start the job again" >&2
    for _ in $(seq 60); do mine && sleep 10; done
    asked() { true; }
  fi
  if mine && asked; then
    scontrol requeue "$JOB" && echo "disttrain: job $JOB requeued" >&2
  fi
  # A job that ends by itself now would not be requeued: stay until SLURM ends it.
  mine || sleep 300
fi
