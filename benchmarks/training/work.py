"""A training that takes what trainings take: torch's threads, memory bandwidth, and every byte of its state changes."""

from __future__ import annotations

from typing import Any

import torch
from common import MB, now


class Training:
    """A stack of linear layers with residuals under Adam, whose state has so many megabytes."""

    def __init__(self, mb: int, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        parameters = mb * MB / 12  # 4 bytes each, and Adam's two moments
        width = 1024 if parameters > 1 << 20 else max(16, int(parameters**0.5))
        depth = max(1, round(parameters / width**2))
        self._layers = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(depth)])
        self._optimizer = torch.optim.Adam(self._layers.parameters(), lr=1e-3)
        self._batch = torch.randn(16, width)
        self.step()

    def step(self) -> float:
        """Train; gives the loss."""
        hidden = self._batch
        for layer in self._layers:
            hidden = hidden + torch.relu(layer(hidden)) / len(self._layers)
        loss = (hidden - self._batch.flip(0)).square().mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def seconds(self) -> float:
        """What a step takes, about."""
        self.step()
        begin = now()
        for _ in range(3):
            self.step()
        return (now() - begin) / 3

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self._layers.state_dict(), "optim": self._optimizer.state_dict()}
