"""Trained models in the forms that other programs read, each read back and compared before it is kept."""
