"""Measurements, run by hand: `minigpt2 bench attention | generate | memory | step`, beside a peer in the same run."""
