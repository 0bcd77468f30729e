"""The campaign of the benchmark, in part: nothing hangs, nothing crashes, honest clients notice nothing."""

import numpy as np
import pytest

from ahawam_jax.inference.handover import HAND_OVERS
from ahawam_jax.serving import server
from ahawam_jax.serving.server import Limits
from benchmarks import hostile
from tests.serving.stub import ACTIONS, observation, running

ROUNDS = 16


def test_hostile_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 1.0)  # seconds that the half-open ones are waited for
    monkeypatch.setattr(server, "PING", 1.0)
    monkeypatch.setattr(hostile, "PATIENCE", 20.0)
    kinds = [*hostile.MESSAGES, *hostile.WAYS]
    shown = [observation(seed, rest=np.full((2, ACTIONS), seed / 8), delay=seed % 2) for seed in range(3)]
    with running(limits=Limits(clients=8, rate=1e6), hand_over=HAND_OVERS["jacobian-free"]) as found:
        report = hostile.campaign(found.port, shown, ROUNDS * len(kinds))
        assert found.thread.is_alive()
    assert report.compared > 10 and report.differing == 0
    count = {kind: sum(number for (of, _), number in report.endings.items() if of == kind) for kind in kinds}
    assert count == dict.fromkeys(kinds, ROUNDS)
    good = {"another instruction", "flipped"}  # of bytes flipped in a picture nothing is wrong
    answered = {kind for (kind, ending) in report.endings if ending == "answered"}
    assert "another instruction" in answered and answered <= good
    assert report.endings["another instruction", "answered"] == ROUNDS
    said = {kind for (kind, ending) in report.endings if ending == "sentence"}
    assert said == {*hostile.MESSAGES, "text"} - {"another instruction"}
    assert not any(report.endings[kind, "closed"] for kind in hostile.MESSAGES)
