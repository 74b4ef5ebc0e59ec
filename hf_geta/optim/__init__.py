"""HOW does it move? QASSO, its schedule and its rules."""
