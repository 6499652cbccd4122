#!/bin/sh
# Runs a compiler and keeps what it says in OBJECT.messages: what ptxas says of each kernel's registers, shared
# memory and spills is held against limits by tests/test_cuda_resources.py. Shown only where the compiler fails.
previous=
for argument; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
"$@" > "$object.messages" 2>&1
status=$?
if [ $status != 0 ]; then cat "$object.messages"; fi
exit $status
