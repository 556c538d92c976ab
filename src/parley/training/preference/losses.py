"""Preference losses as functions of summed log-probabilities, one for each document.

The formulas and their defaults are those of TRL 1.16: DPOTrainer, KTOTrainer, and ORPOTrainer and CPOTrainer of
trl.experimental; tests/training/preference compares values and gradients. Every loss is a mean over the pairs, or the
labelled answers, of one micro-batch.

Shape suffixes (legend in docs/design.md): B pairs or answers of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parley.errors import UsageError
from parley.train_step.slots import copy_to
from parley.training.preference.documents import PreferenceDocument, Role

Figures = dict[str, Tensor]
"""Values for the log by TRL's names, each 0-dim; "rewards/chosen" and so on."""


class Objective(Protocol):
    """A loss of one micro-batch."""

    @property
    def needs_reference(self) -> bool: ...

    def answers(self, sums: Tensor) -> Tensor:
        """The log-probability of each answer, (N,), from the sums of `slots_of`, (3 N,)."""
        ...

    def __call__(
        self, documents: Sequence[PreferenceDocument], answer: Tensor, prompt: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Figures]:
        """The loss, 0-dim, and figures for the log.

        Args:
            answer: summed log-probability of each document's answer, (N,), with its graph.
            prompt: the same of its supervised prompt, zero where it has none.
            reference: `answer` of the reference model.
        """
        ...


@dataclass(frozen=True)
class Pairs:
    """Both answers of each pair of a micro-batch: log-ratios to the reference, log-probabilities, and lengths."""

    chosen_B: Tensor  # log-ratio of the chosen answer
    rejected_B: Tensor
    chosen_logp_B: Tensor
    rejected_logp_B: Tensor
    chosen_tokens_B: Tensor
    rejected_tokens_B: Tensor


class WholeAnswers:
    """The log-probability of an answer is that of all its tokens."""

    def answers(self, sums: Tensor) -> Tensor:
        return sums[: len(sums) // 3]


@dataclass(frozen=True)
class DPO:
    """Direct preference optimization (arXiv 2305.18290) and its relatives, by the names of trl.DPOConfig.

    divergence: of f-DPO (arXiv 2309.16240); alpha is that of "alpha_divergence".
    ld_alpha: weight of the longer answer's tokens behind the shorter one's length (arXiv 2409.06411); None for 1.
    """

    losses: Sequence[str]
    weights: Sequence[float]
    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    divergence: str = "reverse_kl"
    alpha: float = 0.5
    ld_alpha: float | None = None
    needs_reference: bool = True

    def answers(self, sums: Tensor) -> Tensor:
        whole, _, tail = sums.view(3, -1)
        return whole if self.ld_alpha is None else whole + self.ld_alpha * tail

    def __call__(
        self, documents: Sequence[PreferenceDocument], answer: Tensor, prompt: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Figures]:
        assert reference is not None
        ratio = answer - reference
        pairs = Pairs(ratio[0::2], ratio[1::2], answer[0::2], answer[1::2], *_answer_tokens(documents, answer.device))
        terms = [
            weight * DPO_LOSSES[name](self, pairs).mean()
            for name, weight in zip(self.losses, self.weights, strict=True)
        ]
        figures = pair_figures(self.beta * pairs.chosen_B, self.beta * pairs.rejected_B, answer)
        # The mean log-ratio of sampled answers would be the divergence; that of the data's answers is a stand-in.
        return torch.stack(terms).sum(), figures | {"kl": ratio.mean().detach()}

    def delta(self, pairs: Pairs) -> Tensor:
        return self.score(pairs.chosen_B) - self.score(pairs.rejected_B)

    def mean_delta(self, pairs: Pairs) -> Tensor:
        """The same per token of each answer, so that long answers weigh no more."""
        chosen_B, rejected_B = self.score(pairs.chosen_B), self.score(pairs.rejected_B)
        return chosen_B / pairs.chosen_tokens_B - rejected_B / pairs.rejected_tokens_B

    def score(self, ratio_B: Tensor) -> Tensor:
        """f'(t) of the divergence at t = exp(ratio)."""
        match self.divergence:
            case "forward_kl":
                return 1 - torch.exp(-ratio_B)
            case "js_divergence":
                return math.log(2) + logsigmoid(ratio_B)
            case "alpha_divergence" if abs(self.alpha - 1) >= 1e-6:  # its limit at 1 is the reverse divergence
                exponent = ((self.alpha - 1) * ratio_B).clamp(max=80.0)  # exp stays representable
                return (torch.exp(exponent) - 1) / (self.alpha - 1)
        return ratio_B

    def optimal_transport(self, delta_B: Tensor) -> Tensor:
        scaled = self.beta * delta_B
        return -(1 - self.label_smoothing) * logsigmoid(scaled) - self.label_smoothing * logsigmoid(-scaled)


def _sigmoid(dpo: DPO, pairs: Pairs) -> Tensor:
    return -logsigmoid(dpo.beta * dpo.delta(pairs))


def _hinge(dpo: DPO, pairs: Pairs) -> Tensor:
    return torch.relu(1 - dpo.beta * dpo.delta(pairs))


def _ipo(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 17 of arXiv 2310.12036, per token."""
    return (dpo.mean_delta(pairs) - 1 / (2 * dpo.beta)) ** 2


def _sigmoid_norm(dpo: DPO, pairs: Pairs) -> Tensor:
    return -logsigmoid(dpo.beta * dpo.mean_delta(pairs))


def _exo_pair(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 16 of arXiv 2402.00856 for two answers."""
    scaled, epsilon = dpo.beta * dpo.delta(pairs), dpo.label_smoothing
    better = torch.sigmoid(scaled) * (logsigmoid(scaled) - math.log1p(-epsilon))
    return better + torch.sigmoid(-scaled) * (logsigmoid(-scaled) - math.log(epsilon))


def _robust(dpo: DPO, pairs: Pairs) -> Tensor:
    """arXiv 2403.00409: unbiased where a share `label_smoothing` of the pairs is swapped."""
    scaled, smoothing = dpo.beta * dpo.delta(pairs), dpo.label_smoothing
    return (-(1 - smoothing) * logsigmoid(scaled) + smoothing * logsigmoid(-scaled)) / (1 - 2 * smoothing)


def _nca_pair(dpo: DPO, pairs: Pairs) -> Tensor:
    chosen, rejected = dpo.beta * pairs.chosen_B, dpo.beta * pairs.rejected_B
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(dpo: DPO, pairs: Pairs) -> Tensor:
    return -logsigmoid(dpo.beta * pairs.chosen_B) - logsigmoid(-dpo.beta * pairs.rejected_B)


def _sppo_hard(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 4.7 of arXiv 2405.00675 with the winner's probability as 1."""
    return (pairs.chosen_B - 0.5 / dpo.beta) ** 2 + (pairs.rejected_B + 0.5 / dpo.beta) ** 2


def _aot(dpo: DPO, pairs: Pairs) -> Tensor:
    """arXiv 2406.05882: sorted margins of the policy against those of the reference."""
    margin_B = pairs.chosen_logp_B - pairs.rejected_logp_B
    reference_B = margin_B - (pairs.chosen_B - pairs.rejected_B)
    return dpo.optimal_transport(margin_B.sort().values - reference_B.sort().values)


def _aot_unpaired(dpo: DPO, pairs: Pairs) -> Tensor:
    """The same over sorted log-ratios of chosen and of rejected answers, which need be no pairs."""
    return dpo.optimal_transport(pairs.chosen_B.sort().values - pairs.rejected_B.sort().values)


def _apo_zero(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 7 of arXiv 2408.06266."""
    return 1 - torch.sigmoid(dpo.beta * pairs.chosen_B) + torch.sigmoid(dpo.beta * pairs.rejected_B)


def _apo_down(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 8 of arXiv 2408.06266."""
    return torch.sigmoid(dpo.beta * pairs.chosen_B) + 1 - torch.sigmoid(dpo.beta * (pairs.chosen_B - pairs.rejected_B))


def _discopop(dpo: DPO, pairs: Pairs) -> Tensor:
    """Equation 5 of arXiv 2406.08414."""
    scaled = dpo.beta * dpo.delta(pairs)
    mix = torch.sigmoid(scaled / dpo.discopop_tau)
    return -logsigmoid(scaled) * (1 - mix) + torch.exp(-scaled) * mix


def _sft(dpo: DPO, pairs: Pairs) -> Tensor:
    """Cross-entropy of the chosen answers per token."""
    return -pairs.chosen_logp_B.sum() / pairs.chosen_tokens_B.sum()


DPO_LOSSES: dict[str, Callable[[DPO, Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "exo_pair": _exo_pair,
    "robust": _robust,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sft": _sft,
}


@dataclass(frozen=True)
class KTO(WholeAnswers):
    """Kahneman-Tversky optimization (arXiv 2402.01306), Equation 7; `loss` is one of trl.KTOConfig's."""

    beta: float
    loss: str = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs_reference: bool = True

    def __call__(
        self, documents: Sequence[PreferenceDocument], answer: Tensor, prompt: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Figures]:
        assert reference is not None
        ratio = answer - reference
        desirable_B, undesirable_B, mismatched_B = (
            ratio[_with_role(documents, role, ratio.device)] for role in ("desirable", "undesirable", "mismatched")
        )
        kl = ratio.new_zeros(())
        if len(mismatched_B):  # a mean of no documents is not a number
            kl = mismatched_B.mean().detach().clamp(min=0)
        good_B = 1 - torch.sigmoid(self.beta * (desirable_B - kl))
        bad_B = 1 - torch.sigmoid(self.beta * (kl - undesirable_B))
        losses_B = torch.cat([self.desirable_weight * good_B, self.undesirable_weight * bad_B])
        figures = {"kl": kl}
        for name, ratio_B in (("chosen", desirable_B), ("rejected", undesirable_B)):
            if len(ratio_B):
                figures[f"rewards/{name}"] = self.beta * ratio_B.detach().mean()
        if len(desirable_B) and len(undesirable_B):
            figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        # An answer is on its side of the reference point: the paired accuracy does not exist without pairs.
        margin_B = torch.cat([desirable_B - kl, kl - undesirable_B]).detach()
        figures["rewards/accuracies"] = (margin_B > 0).float().mean()
        figures["preference_accuracy"] = (0.5 + 0.5 * torch.sign(margin_B)).mean()
        return losses_B.mean(), figures


@dataclass(frozen=True)
class ORPO(WholeAnswers):
    """Odds-ratio preference optimization (arXiv 2403.07691), with the chosen conversation's cross-entropy."""

    beta: float
    needs_reference: bool = False

    def __call__(
        self, documents: Sequence[PreferenceDocument], answer: Tensor, prompt: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Figures]:
        chosen_tokens_B, rejected_tokens_B = _answer_tokens(documents, answer.device)
        chosen_B, rejected_B = answer[0::2] / chosen_tokens_B, answer[1::2] / rejected_tokens_B
        log_odds_B = chosen_B - rejected_B - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
        # TRL's cross-entropy is of the prompt and the answer.
        supervised = sum(document.supervised_tokens for document in documents[0::2])
        nll = -(answer[0::2] + prompt[0::2]).sum() / supervised
        loss = nll - self.beta * logsigmoid(log_odds_B).mean()
        figures = pair_figures(self.beta * chosen_B, self.beta * rejected_B, answer)
        return loss, figures | {"nll_loss": nll.detach(), "log_odds_chosen": log_odds_B.mean().detach()}


@dataclass(frozen=True)
class SimPO(WholeAnswers):
    """Simple preference optimization (arXiv 2405.14734): mean log-probabilities and a margin, without a reference.

    cpo_alpha: weight of the chosen answers' cross-entropy (CPO-SimPO); 0 is the paper's loss.
    """

    beta: float
    gamma: float
    cpo_alpha: float = 0.0
    label_smoothing: float = 0.0
    needs_reference: bool = False

    def __call__(
        self, documents: Sequence[PreferenceDocument], answer: Tensor, prompt: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Figures]:
        chosen_tokens_B, rejected_tokens_B = _answer_tokens(documents, answer.device)
        chosen_B, rejected_B = answer[0::2] / chosen_tokens_B, answer[1::2] / rejected_tokens_B
        scaled = self.beta * (chosen_B - rejected_B) - self.gamma
        smoothing = self.label_smoothing
        losses_B = -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)
        nll = -answer[0::2].sum() / chosen_tokens_B.sum()
        figures = pair_figures(self.beta * chosen_B, self.beta * rejected_B, answer)
        return losses_B.mean() + self.cpo_alpha * nll, figures | {"nll_loss": nll.detach()}


def pair_figures(chosen_B: Tensor, rejected_B: Tensor, answer: Tensor) -> Figures:
    """TRL's figures from the rewards of pairs."""
    chosen_B, rejected_B, answer = chosen_B.detach(), rejected_B.detach(), answer.detach()
    return {
        "rewards/chosen": chosen_B.mean(),
        "rewards/rejected": rejected_B.mean(),
        "rewards/accuracies": (chosen_B > rejected_B).float().mean(),
        "rewards/margins": (chosen_B - rejected_B).mean(),
        # Before the first step all rewards of a loss with a reference are equal: nothing is preferred.
        "preference_accuracy": (0.5 + 0.5 * torch.sign(chosen_B - rejected_B)).mean(),
        "logps/chosen": answer[0::2].mean(),
        "logps/rejected": answer[1::2].mean(),
    }


def dpo_objective(args: Any) -> DPO:
    """The objective of a trl.DPOConfig. Raises UsageError for what is not a function of summed log-probabilities."""
    for name, unsupported in (("use_weighting", args.use_weighting), ("sync_ref_model", args.sync_ref_model)):
        if unsupported:
            raise UsageError(f"{name} is not supported on the packed step; leave it out, or use trl.DPOTrainer")
    for name in args.loss_type:
        if name not in DPO_LOSSES:
            raise UsageError(f"loss_type: got {name!r}; wanted one of {', '.join(DPO_LOSSES)}")
    if args.ld_alpha is not None and "sft" in args.loss_type:
        raise UsageError("ld_alpha weights the tokens of a preference; loss_type sft has none: leave one of them out")
    weights = args.loss_weights or [1.0] * len(args.loss_type)
    return DPO(
        args.loss_type, weights, args.beta, args.label_smoothing, args.discopop_tau, args.f_divergence_type,
        args.f_alpha_divergence_coef, args.ld_alpha,
    )  # fmt: skip


def kto_objective(args: Any) -> KTO:
    """The objective of a trl.KTOConfig."""
    if args.sync_ref_model:
        raise UsageError("sync_ref_model is not supported on the packed step; leave it out, or use trl.KTOTrainer")
    return KTO(args.beta, args.loss_type, args.desirable_weight, args.undesirable_weight)


def _with_role(documents: Sequence[PreferenceDocument], role: Role, device: torch.device) -> Tensor:
    """Indices of the documents with a role."""
    return copy_to(device, torch.tensor([index for index, d in enumerate(documents) if d.role == role]).long())


def _answer_tokens(documents: Sequence[PreferenceDocument], device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens of the chosen and of the rejected answers, each (B,)."""
    tokens = torch.tensor([float(document.answer_tokens) for document in documents])
    tokens = copy_to(device, tokens)
    return tokens[0::2], tokens[1::2]


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by the branch that keeps precision (Maechler 2012); a probability of 1 is clamped."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -math.log(2), torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))
