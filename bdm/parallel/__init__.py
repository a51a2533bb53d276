"""How processes share work: replicas and split weights of a run, tasks of a cluster's workers."""
