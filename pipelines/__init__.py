"""Floor 5: the programs; one file per command. Knows everything and computes nothing."""
