"""Measuring what a run's own table does not say: speed by tree, ablations, ceilings, distance to the hardware."""
