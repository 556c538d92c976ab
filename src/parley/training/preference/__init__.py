"""Learning from preferences: losses, reference, and the trainers that put both on the packed step."""
