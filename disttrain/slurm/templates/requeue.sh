
# The rank that saved has requeued the job, or asks for it in RUN_DIR/requeue (no scontrol in a container, say).
# Ranks that were told before they could save anything ended by the signal: 143, or 138, or a preemption is noted.
# Another attempt of this job may run elsewhere if this node was cut off: the count of restarts tells.
restart=${SLURM_RESTART_COUNT:-0}
job() { scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$1=//p" | head -n 1; }
asked() {
  [ "$(cat "$RUN_DIR/requeue" 2>/dev/null)" = "$SLURM_JOB_ID $restart" ] || [ "$code" = 143 ] ||
    [ "$code" = 138 ] || [ "$(job PreemptTime)" != None ]
}
if [ "$code" -ne 0 ] && [ "$restart" -lt {{max_requeues}} ]; then
  if [ "$(job JobState)" = RUNNING ] && [ "$(job Restarts)" = "$restart" ] && asked; then
    scontrol requeue "$SLURM_JOB_ID" && echo "disttrain: job $SLURM_JOB_ID requeued" >&2
  fi
  # A job that ends by itself now would not be requeued: stay until SLURM ends it.
  if [ "$(job JobState)" != RUNNING ]; then sleep 300; fi
fi
