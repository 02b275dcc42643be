# In the background, so that this shell handles signals while it waits.
step &
pid=$!{{pass_on}}
while true; do
  wait "$pid"
  code=$?
  kill -0 "$pid" 2>/dev/null || break
done{{requeue}}
exit "$code"
