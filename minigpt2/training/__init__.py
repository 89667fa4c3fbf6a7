"""The parts of train.py: a step, the state of a run, snapshots, many processes, metrics, and what may go wrong."""
