"""Group Tree Optimization and Learning to Draft, small enough to read."""
import os

# Two OpenMP threads that move between the cores of a virtual machine meet on one: bound ones train a quarter faster
# (0.30 instead of 0.38 s a step of the target). While they wait they spin for some 100 microseconds: the library's
# default slows a step 20-fold when a core is busy. libgomp reads this once, when torch is imported.
os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
