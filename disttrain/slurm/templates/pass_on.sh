
# Before the time limit SLURM signals only this shell, which signals the ranks as soon as the controller accepts it.
told=
pass_on() { until scancel --signal=USR1 "$JOB" || ! kill -0 "$pid" 2>/dev/null; do sleep 5; done; }
trap 'told=1; pass_on &' USR1
