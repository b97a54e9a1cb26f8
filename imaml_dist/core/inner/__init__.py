"""Inner solvers: from the meta-parameters to a task's own parameters; one solver per file."""
