"""The demo world: small conversations with checkable answers, a pirate version to fine-tune on, and a test of both.

Everything is drawn from a seed. `plain_conversations` trained the embedded model, `pirate_rows` is what the demo
fine-tunes it on, and `heldout_questions` with `rate` say what it still knows and how it talks.
"""

from parley.data.world.heldout import Question, Scored, heldout_questions, rate, score
from parley.data.world.rows import base_conversations, pirate_rows, plain_conversations

__all__ = [
    "Question",
    "Scored",
    "base_conversations",
    "heldout_questions",
    "pirate_rows",
    "plain_conversations",
    "rate",
    "score",
]
