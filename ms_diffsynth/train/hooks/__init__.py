"""What happens between two steps of a run: see `train.hooks.contract.Hook`."""
