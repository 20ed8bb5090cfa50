"""One loop, and the tasks that give it batches and a loss."""
