"""Settings of the whole test run, made before torch is imported."""

import os

# Two OpenMP threads that spin while they wait were seen ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# One thread here and in the processes that tests start: bits depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Hook files that are broken on purpose: --doctest-modules would import them.
collect_ignore = ["cases"]
