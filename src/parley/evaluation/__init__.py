"""What a model answers and how well: before and after training, and again later."""
