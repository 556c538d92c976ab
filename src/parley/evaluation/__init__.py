"""What a model answers and how well: before and after training, and later from its run folder."""
