"""The frozen head and its loss, forward and backward: Parley's chunks against kernels whose logits never reach memory.

    python benchmarks/head_loss.py --shape gemma3-1b --rows 640

`parley` is train_step/lm_head.py's: one chunk of logits in memory, its gradient written over it. `cce` is Apple's
cut-cross-entropy (arXiv 2411.09009), `liger` Liger's fused linear cross entropy, where they are installed. Times are of
the loss and its gradient by the hidden states, medians; memory is what they allocate at the peak.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from parley.train_step import kernels
from parley.train_step.ops import LogitTransform

SHAPES = {"1b": (2048, 128256), "gemma3-1b": (1152, 262144), "phi4-mini": (3072, 200064), "8b": (4096, 128256)}
CHUNK = 1024


def parley(x_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> tuple[Tensor, Tensor]:
    logits_SV = x_SD.new_empty(CHUNK, len(head_VD))
    metrics_3, scale, dx_SD = x_SD.new_zeros(3, dtype=torch.float32), x_SD.new_ones((), dtype=torch.float32), []
    for part_SD, part_S in zip(x_SD.split(CHUNK), target_S.split(CHUNK), strict=True):
        part_SV = torch.mm(part_SD, head_VD.t(), out=logits_SV[: len(part_SD)])
        kernels.cross_entropy(part_SV, part_S, scale, metrics_3, LogitTransform())
        dx_SD.append(part_SV @ head_VD)
    return metrics_3[0], torch.cat(dx_SD)


def others() -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]]]:
    def autograd(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
        def run(x_SD: Tensor, head_VD: Tensor, target_S: Tensor) -> tuple[Tensor, Tensor]:
            x_SD = x_SD.detach().requires_grad_()
            total = loss(x_SD, head_VD, target_S.long())
            total.backward()
            assert x_SD.grad is not None
            return total.detach(), x_SD.grad

        return run

    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        yield "cce", autograd(lambda x, head, target: linear_cross_entropy(x, head, target, reduction="sum"))
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        yield "liger", autograd(lambda x, head, target: liger(head, x, target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["1b", "gemma3-1b"], choices=SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=[640, 4096])
    args = parser.parse_args()
    for shape in args.shape:
        hidden, vocabulary = SHAPES[shape]
        head_VD = 0.02 * torch.randn(vocabulary, hidden, device="cuda", dtype=torch.bfloat16)
        for rows in args.rows:
            x_SD = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
            target_S = torch.randint(vocabulary, (rows,), device="cuda", dtype=torch.int32)
            _, wanted_SD = parley(x_SD, head_VD, target_S)
            for name, run in [("parley", parley), *others()]:
                loss, dx_SD = run(x_SD, head_VD, target_S)
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                walls = []
                for _ in range(12):
                    start = time.perf_counter()
                    run(x_SD, head_VD, target_S)
                    torch.cuda.synchronize()
                    walls.append(1000 * (time.perf_counter() - start))
                result = {
                    "shape": shape, "rows": rows, "kernel": name, "ms": round(statistics.median(walls), 3),
                    "peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20),
                    "loss": round(float(loss) / rows, 4),
                    "difference": round(float((dx_SD - wanted_SD).norm() / wanted_SD.norm()), 4),
                }  # fmt: skip
                print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
