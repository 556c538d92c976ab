"""An OpenAI-compatible server over the scheduler: what was trained, under two names, for many clients at once."""
