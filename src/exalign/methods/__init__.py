"""One file per method: its settings, what it needs, its batches and loss, its label and its line in the report."""
