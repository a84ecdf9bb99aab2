"""The policy: loading, losses, other parameter values, generation."""
