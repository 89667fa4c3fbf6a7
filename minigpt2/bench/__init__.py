"""Measurements, run by hand: `minigpt2 bench attention | memory | step`. Each compares with a peer in the same run."""
