
# Before the time limit SLURM tells this shell alone; it tells the ranks, again and again, since those that have not
# begun to train do not listen yet.
pass_on() { while kill -0 "$pid" 2>/dev/null; do scancel --signal=USR1 "$JOB"; sleep 10; done; }
trap 'pass_on &' USR1
