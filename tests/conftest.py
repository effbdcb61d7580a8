"""Settings of the whole test run, made before torch is imported."""

import os

# Two OpenMP threads that spin while they wait were seen ten times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
