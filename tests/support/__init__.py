"""What several test files need: data, policies, problems with known answers, runs that are killed."""
