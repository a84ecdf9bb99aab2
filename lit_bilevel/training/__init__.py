"""Training: what surrounds a step of `LitBilevel` (optimizers, refusals, exchange between ranks, guard, checkpoint)."""
