"""Runs with sharded weights learn what a run of one process learns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rich.console import Console
from tests.distributed.conftest import in_processes
from tests.distributed.test_data_parallel import assert_same_run

from parley.config import RunConfig
from parley.errors import ParleyError, UsageError
from parley.pipeline import train

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    ("count", "settings"),
    [(2, ("model.quantization=nf4",)), (4, ())],
    ids=["nf4", "fp32"],
)
def test_a_sharded_run_learns_what_one_process_learns(
    configured: Callable[..., RunConfig], count: int, settings: tuple[str, ...]
) -> None:
    alone = configured("training.engine=captured", *settings)
    train(alone, QUIET)
    together = configured("training.shard=full", *settings)
    assert in_processes(count, lambda: train(together, QUIET)) == [0] * count
    assert_same_run(together.output, alone.output)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("training.engine=plain",), "training.engine: plain do not go together"),
        (("training.method=kto",), "training.method: kto do not go together"),
        (("lora.use_dora=true",), "lora.use_dora do not go together"),
        (("lora.init_lora_weights=pissa",), "lora.init_lora_weights do not go together"),
        (("model.quantization=int8",), "model.quantization: int8 is not sharded; there are none, nf4"),
    ],
)
def test_what_sharded_weights_do_not_follow_is_refused(
    configured: Callable[..., RunConfig], capfd: pytest.CaptureFixture[str], settings: tuple[str, ...], message: str
) -> None:
    config = configured("training.shard=full", *settings)

    def work() -> None:
        try:
            train(config, QUIET)
        except ParleyError as error:
            print(error)
            raise

    assert in_processes(2, work) != [0, 0]
    assert message in capfd.readouterr().out


def test_sharding_takes_several_processes(configured: Callable[..., RunConfig]) -> None:
    with pytest.raises(UsageError, match="cuts weights over processes, and there is one; add --gpus N"):
        train(configured("training.shard=full"), QUIET)
