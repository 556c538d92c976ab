"""The figures of a comparison as text, the same in the terminal, the card and the report."""

from __future__ import annotations

from parley.exporting.comparison import Figures


def figure_rows(figures: Figures) -> list[tuple[str, str]]:
    """Name and value of what was measured."""
    rows = [("read by", figures.program), ("compared on", figures.source)]
    if figures.prompts:
        rows.append(("prompts with the same token ids", f"{figures.prompts_equal} of {figures.prompts}"))
    if figures.left_out:
        rows.append(("left out: control-token text", f"{figures.left_out} conversations"))
    if figures.tokens:
        assert figures.loss is not None
        assert figures.top1 is not None
        rows += [
            ("tokens compared", f"{figures.tokens:,}"),
            ("most likely token the same", f"{figures.top1:.2%}"),
            ("KL divergence, mean and worst", f"{figures.mean_kl:.2g} and {figures.worst_kl:.2g} nats"),
            ("largest logit difference", f"{figures.worst_logit:.2g}"),
            ("held-out loss, trained and exported", f"{figures.loss_trained:.4f} and {figures.loss:.4f}"),
        ]
    if figures.answers:
        rows.append(("greedy answers the same", f"{figures.answers_equal} of {figures.answers}"))
    return rows
