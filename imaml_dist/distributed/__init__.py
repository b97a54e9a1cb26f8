"""Floor 4: one training loop on any number of workers, with and without Ray."""
