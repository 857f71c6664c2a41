"""What a technique does, one file each: it acts on the module, the traced graph, the plan or the run."""
