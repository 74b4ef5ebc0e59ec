"""WHO else can run it? A compressed checkpoint, written in the formats of other programs; one module for each."""
