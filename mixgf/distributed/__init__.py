"""Ray: data, training groups, actor pools and tasks on a cluster. The only package that imports ray."""
