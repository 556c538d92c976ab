from __future__ import annotations

import pytest
import torch

from parley.train_step.graph_threshold import BUSY_HOST, EAGER_PASSES, GraphThreshold


@pytest.fixture
def threshold(monkeypatch: pytest.MonkeyPatch) -> GraphThreshold:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return GraphThreshold(torch.device("cpu"))


def test_nothing_is_captured_before_the_second_pass_has_been_timed(threshold: GraphThreshold) -> None:
    measured, launched = [], []
    threshold.measure = lambda *figures: measured.append(figures)  # type: ignore[method-assign]
    for i in range(EAGER_PASSES):
        assert not threshold.pays(1)
        threshold.run(100 + i, lambda: launched.append(len(measured)))
    assert launched == [0] * EAGER_PASSES
    assert [figures[0] for figures in measured] == [100 + EAGER_PASSES - 1]
    assert threshold.is_known
    assert threshold.pays(10**9)  # launches took as long as the pass


def test_passes_whose_kernels_take_longer_than_their_launches_run_without_a_graph(threshold: GraphThreshold) -> None:
    threshold.passes = EAGER_PASSES
    threshold.measure(4000, launched=0.02, finished=0.1)
    assert threshold.max_tokens == pytest.approx(800 * BUSY_HOST)
    assert threshold.pays(1500)
    assert not threshold.pays(1700)


def test_passes_that_the_host_launches_as_slowly_as_they_run_are_captured(threshold: GraphThreshold) -> None:
    threshold.passes = EAGER_PASSES
    threshold.measure(4000, launched=0.1, finished=0.1 * BUSY_HOST)
    assert threshold.pays(10**9)
