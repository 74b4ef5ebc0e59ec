"""The parts of reproduce.py: what a table compares (plan), how one run is made (run), what it shows (summary, ...)."""
