"""The trainings, each of which saves as it goes."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import Plan
from .model import GPT, adapt
from .text import Tokens, sources

DECAY = 0.999
BETAS = (0.9, 0.95)


def make(home: Path, plan: Plan) -> None:
    """Train on the library, then tune on its tests."""
    torch.use_deterministic_algorithms(True)
    library = list(sources(tests=False, most=plan.text))
    tokens = Tokens(library, plan.vocabulary)
    torch.manual_seed(0)
    model = GPT(plan.width, plan.layers, plan.vocabulary, plan.context)
    pretrain(home, plan, model, tokens.of(library))
    text = tokens.of(list(sources(tests=True, most=plan.text)))
    for rate in ("1e-5", "1e-4"):
        for kind, dtype in (("bf16", torch.float32), ("pure", torch.bfloat16)):
            tune(home / f"{kind}-{rate}", plan, copy.deepcopy(model).to(dtype), text, float(rate))
    adapters(home, plan, copy.deepcopy(model), text)


def pretrain(home: Path, plan: Plan, model: GPT, text: torch.Tensor) -> None:
    """Weights, Adam's moments and an EMA of the weights, under a cosine."""
    average = copy.deepcopy(model).requires_grad_(False)
    last = plan.saves[-1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=BETAS, weight_decay=0.1)
    for step, loss in enumerate(steps(model, optimizer, text, plan, last, lambda at: cosine(at, last)), 1):
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(parameter, 1 - DECAY)
        if step in plan.saves:
            print(f"step {step}: loss {loss:.3f}", flush=True)
            save_state(home, "adam", step, model, optimizer)
            save(home / "ema", step, named(average))


def tune(home: Path, plan: Plan, model: GPT, text: torch.Tensor, rate: float) -> None:
    """Weights in bf16, of a model that trains in bf16 itself or in fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=BETAS, weight_decay=0.0)
    save(home, 0, {name: tensor.bfloat16() for name, tensor in named(model).items()})
    for step, loss in enumerate(steps(model, optimizer, text, plan, plan.tunes[-1]), 1):
        if step in plan.tunes:
            print(f"{home.name}, step {step}: loss {loss:.3f}", flush=True)
            save(home, step, {name: tensor.bfloat16() for name, tensor in named(model).items()})


def adapters(home: Path, plan: Plan, model: GPT, text: torch.Tensor) -> None:
    """The whole model each time, as most savers do it, and what Adam knows of what trains."""
    torch.manual_seed(1)
    adapt(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, betas=BETAS)
    for step, loss in enumerate(steps(model, optimizer, text, plan, plan.tunes[-1]), 1):
        if step in plan.tunes:
            print(f"frozen, step {step}: loss {loss:.3f}", flush=True)
            save_state(home, "frozen", step, model, optimizer)


def cosine(step: int, last: int) -> float:
    """Part of the rate: a short warm-up, then down to a tenth."""
    warm = min(1.0, (step + 1) / 50)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / last)))


def steps(
    model: GPT,
    optimizer: torch.optim.Optimizer,
    text: torch.Tensor,
    plan: Plan,
    count: int,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> Iterator[float]:
    """Train; yields the loss after each step."""
    generator = torch.Generator().manual_seed(0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in range(count):
        starts = torch.randint(len(text) - plan.context - 1, (plan.batch, 1), generator=generator)
        loss = model.loss(text[starts + torch.arange(plan.context + 1)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        yield loss.item()


def named(model: GPT) -> dict[str, torch.Tensor]:
    """The weights, each once."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def save_state(home: Path, name: str, step: int, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Weights and Adam's moments, in both formats; each holds the same tensors."""
    tensors = named(model)
    names = {parameter: key for key, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"optim.{names[parameter]}.{moment}"] = state[moment]
    save(home / name, step, tensors)
    (home / f"{name}-pt").mkdir(exist_ok=True)
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": step}
    torch.save(state, home / f"{name}-pt" / f"{step:05}.pt")


def save(home: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file."""
    home.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, home / f"{step:05}.safetensors")
