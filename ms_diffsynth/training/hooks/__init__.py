"""What happens between two steps of a run; `contract.Hook` says what a hook is."""
