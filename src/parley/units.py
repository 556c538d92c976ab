"""Units of measurement that several packages share."""

GIB = 2**30  # bytes
