"""Measurements, run by hand: `minigpt2 bench attention | generate | memory | step`. Each has its peer in the same run."""
