"""Measurements, run by hand: `minigpt2 bench attention | generate | memory | step`, each beside a peer in one run."""
