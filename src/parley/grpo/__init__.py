"""Group relative policy optimization: answers sampled by Parley's decoder, TRL's advantages and loss, packed rows."""
