"""What finds faults: reference cases recomputed and compared."""
