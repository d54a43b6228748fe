"""What every task shares: optimiser, schedule, checkpoints, callbacks."""
