"""Data: files to rows, rows to tokens, tokens to the batches of policy steps."""
