
# Before the time limit SLURM tells this shell alone; it tells the ranks, once the controller hears it.
told=
pass_on() { until scancel --signal=USR1 "$JOB" || ! kill -0 "$pid" 2>/dev/null; do sleep 5; done; }
trap 'told=1; pass_on &' USR1
