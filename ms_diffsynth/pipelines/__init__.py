"""Model families, one folder each: the only place that imports mindone's networks."""
