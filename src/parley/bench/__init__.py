"""Times one training job with several trainers, each in its own process, one after the other, on the same rows."""
