"""Group Tree Optimization and Learning to Draft, small enough to read."""
import os

# Two OpenMP threads that spin for long while they wait slow small CPU matrix products 20-fold when a core is busy; ones
# that never spin lose a fifth when none is. 1000 turns, some microseconds, is near the best of both. libgomp reads
# these once, when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
