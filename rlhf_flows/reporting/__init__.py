"""What people see of a run: the terminal, Prefect's artifacts, a summary, a look at the store."""
