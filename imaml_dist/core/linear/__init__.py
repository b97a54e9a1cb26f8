"""Linear solvers for symmetric systems, batched over tasks; one solver per file."""
