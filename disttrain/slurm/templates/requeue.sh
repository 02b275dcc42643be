
# The rank that saved has requeued the job, or left a request in RUN_DIR/requeue (for example, without scontrol in a
# container). Ranks that were signalled before they could save anything ended with 138 (SIGUSR1); or SLURM records a
# preemption. 143 (SIGTERM) means nothing, because srun ends the peers of any failed rank with it.
# If this node was cut off, another attempt of this job may run elsewhere: compare the restart count.
restart=${SLURM_RESTART_COUNT:-0} shown= asks=0
# Query SLURM about this job; while its controller is down, retry for some minutes.
look() {
  command -v scontrol >/dev/null || return
  until shown=$(scontrol -o show job "$JOB" 2>&1); do
    case $shown in *"Invalid job id"*) return ;; esac
    [ $((asks += 1)) -le 30 ] || return
    [ "$asks" -gt 1 ] || echo "disttrain: SLURM does not answer, retrying: $shown" >&2
    sleep 5
  done
}
field() { tr ' ' '\n' <<<"$shown" | sed -n "s/^$1=//p" | head -n 1; }
mine() { look; [ "$(field JobState)" = RUNNING ] && [ "$(field Restarts)" = "$restart" ]; }
asked() {
  [ "$(cat "$RUN_DIR/requeue" 2>/dev/null)" = "$JOB $restart" ] || [ "$code" = 138 ] || [ -n "${told-}" ] ||
    case $(field PreemptTime) in "" | None) false ;; esac
}
answers() { timeout 60 srun --overlap --ntasks-per-node=1 true 2>/dev/null; }
dead() { scontrol -o show node "$SLURM_JOB_NODELIST" 2>/dev/null | grep -Eq ' State=[^ ]*(DOWN|NOT_RESPONDING|\*)'; }
if [ "$code" -ne 0 ] && [ "$restart" -lt {{max_requeues}} ]; then
  if mine && ! asked && ! answers; then
    # A node died, and the other ranks ended first: SLURM will notice and restart the job on other nodes.
    echo "disttrain: a node does not answer; waiting for SLURM to restart the job" >&2
    lost=
    for _ in $(seq 60); do
      mine || break
      if dead; then lost=1; fi
      sleep 10
    done
    # If SLURM marks no node, the test step failed for another reason, and so the ranks failed by themselves.
    asked() { [ -n "$lost" ]; }
  fi
  for _ in 1 2 3; do
    mine && asked || break
    if scontrol requeue "$JOB"; then
      echo "disttrain: job $JOB requeued" >&2
      break
    fi
    sleep 5
  done
  # A job that ends by itself now would not be requeued: wait until SLURM ends it.
  mine || sleep 300
fi
