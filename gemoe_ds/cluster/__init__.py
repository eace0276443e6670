"""Life on a cluster: stopping on a signal, noticing who has stopped, checks before a run, jobs."""
