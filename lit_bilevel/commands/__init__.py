"""The commands that are not Lightning's, one a file."""
