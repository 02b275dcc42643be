
# The rank that saved has requeued the job, or asks for it in RUN_DIR/requeue (no scontrol in a container, say).
# Ranks that were told before they could save anything ended by SIGUSR1, 138; or a preemption is noted. A death by
# SIGTERM, 143, says nothing: srun ends the peers of any rank that failed so.
# Another attempt of this job may run elsewhere if this node was cut off: the count of restarts tells.
restart=${SLURM_RESTART_COUNT:-0} shown= asks=0
# What SLURM says of this job. While its controller is away it says nothing, and is asked again, for some minutes.
look() {
  command -v scontrol >/dev/null || return
  until shown=$(scontrol -o show job "$JOB" 2>&1); do
    case $shown in *"Invalid job id"*) return ;; esac
    [ $((asks += 1)) -le 30 ] || return
    [ "$asks" -gt 1 ] || echo "disttrain: SLURM does not answer and is asked again: $shown" >&2
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
    # A node died, and its ranks' peers ended first: SLURM sees it in a while, and starts the job on other nodes.
    echo "disttrain: a node does not answer; waiting for SLURM to start the job again" >&2
    lost=
    for _ in $(seq 60); do
      mine || break
      if dead; then lost=1; fi
      sleep 10
    done
    # Where SLURM misses no node, a step on all of them failed for another reason, and the ranks did by themselves.
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
  # A job that ends by itself now would not be requeued: stay until SLURM ends it.
  mine || sleep 300
fi
