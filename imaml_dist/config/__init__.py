"""Floor 3: the typed, frozen configuration of an experiment."""
