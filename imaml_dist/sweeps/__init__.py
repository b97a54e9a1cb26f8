"""Floor 4: sweeps without Ray: what each trial draws, the ledger of trials, and what comes out (the only optuna import)."""
