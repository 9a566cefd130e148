"""What this process sets up and starts on its machine: defaults, a cache, a Prefect server."""
