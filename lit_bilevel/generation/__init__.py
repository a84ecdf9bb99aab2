"""Generation: prompts in, responses with their token ids and log-probabilities out."""
