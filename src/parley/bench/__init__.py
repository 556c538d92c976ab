"""One training job on several trainers, each in a process of its own, in turn, on the same rows."""
