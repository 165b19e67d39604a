"""Steps that do not fit in memory are taken in parts, and are what they would be in one."""

import torch

from csd_2d import Edit, EditConfig, LatentStack, schedule
from csd_2d.priors.analytic import AnalyticPrior


def test_learning_rates_decay_with_the_steps_of_the_configuration(monkeypatch):
    latents, rates = torch.rand(4, 3, 2, 2), {}
    for most in (4, 2):
        monkeypatch.setattr(schedule, "MAX_STEP_ELEMENTS", most * latents[0].numel())
        config = EditConfig(steps=6, lr=0.5, lr_decay=0.5, lr_decay_every=2)
        run = Edit(LatentStack(latents), AnalyticPrior(), "make it night", config)
        rates[most] = []
        while not run.done:
            rates[most].append(run.state_dict()["lr"])
            run.step()
    assert rates[4] == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert rates[2] == [rate for rate in rates[4] for _ in range(2)]
