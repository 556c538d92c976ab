"""`parley plan`: memory, steps, time and disk of a configuration, without loading weights."""
