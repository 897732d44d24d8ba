"""A small real training, made to be killed; a program for test_kills.py.

::

    python trainer.py numpy|torch       # reads orders, one JSON object a line; a process id answers each

Every order is trained in a process of its own, forked from this one so that a life does not begin with a second of
imports. What a call has taken is noted in a ledger after that call has returned, so that the ledger never says more
than what was promised.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
import time

import numpy as np
from blake3 import blake3

import mandapa.run.outbox
import mandapa.run.process
import mandapa.run.saving
from mandapa import CheckpointSaver, Limits, Run
from mandapa.loggers import FileLogger, ObjectStoreLogger, TensorboardLogger

SHAPE = (48, 8)
RATE, MOMENTUM = 0.05, 0.9


class NumpyModel:
    """Linear regression by gradient descent with momentum: what it is after a step is a function of the step."""

    format = "safetensors"

    def __init__(self):
        self.weight = np.zeros(SHAPE, np.float32)
        self.velocity = np.zeros(SHAPE, np.float32)

    def train(self, step):
        inputs, targets = batch(step)
        error = inputs @ self.weight - targets
        self.velocity = MOMENTUM * self.velocity + (inputs.T @ error) / len(inputs)
        self.weight = self.weight - RATE * self.velocity
        return float((error**2).mean())

    def state(self, step):
        seen = np.full(64, step, np.int64)  # in the bytes of the tensors, not only in the header
        model = {"weight": self.weight, "seen": seen, "step": step}
        return {"model": model, "optim": {"velocity": self.velocity, "seen": seen.copy(), "step": step}}

    def load(self, state):
        self.weight, self.velocity = state["model"]["weight"], state["optim"]["velocity"]

    def fingerprint(self):
        return blake3(self.weight.tobytes() + self.velocity.tobytes()).hexdigest()


class TorchModel:
    """The same with torch: a layer and its optimizer."""

    format = "torch"

    def __init__(self):
        self.layer = torch.nn.Linear(SHAPE[0], SHAPE[1], bias=False)
        torch.nn.init.zeros_(self.layer.weight)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=RATE, momentum=MOMENTUM)

    def train(self, step):
        inputs, targets = map(torch.from_numpy, batch(step))
        loss = ((self.layer(inputs) - targets) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def state(self, step):
        seen = torch.full((64,), step)
        model = {**self.layer.state_dict(), "seen": seen, "step": step}
        return {"model": model, "optim": {**self.optimizer.state_dict(), "seen": seen.clone(), "step": step}}

    def load(self, state):
        self.layer.load_state_dict({"weight": state["model"]["weight"]})
        self.optimizer.load_state_dict({name: state["optim"][name] for name in ("state", "param_groups")})

    def fingerprint(self):
        momentum = [value["momentum_buffer"] for value in self.optimizer.state.values()]
        return blake3(b"".join(t.detach().numpy().tobytes() for t in [self.layer.weight, *momentum])).hexdigest()


MODELS = {"numpy": NumpyModel, "torch": TorchModel}


def use(kind):
    """Load what a kind of model needs; gives its class."""
    global torch
    if kind == "torch":
        import torch

        torch.set_num_threads(1)
    return MODELS[kind]


def batch(step):
    """Inputs and targets of a step."""
    draw = np.random.default_rng(step)
    inputs = draw.standard_normal((32, SHAPE[0]), np.float32)
    truth = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    return inputs, (inputs @ truth).astype(np.float32)


def check(state, step):
    """Whether a state is one whole state of that step: its model and its optimizer, their headers and their tensors."""
    for half in (state["model"], state["optim"]):
        assert half["step"] == step
        assert {int(seen) for seen in half["seen"]} == {step}


class Ledger:
    """Lines of what has returned; read by the test while it grows and after the death of who wrote it."""

    def __init__(self, path):
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def note(self, kind, **facts):
        os.write(self._fd, json.dumps({"kind": kind, **facts}).encode() + b"\n")

    def took(self, kind, handle, path, data, **facts):
        self.note(kind, path=path, size=len(data), digest=blake3(data).hexdigest(), entry=handle._n, **facts)


def train(order, make):
    """One life of the run: as many steps as were ordered, or until it is killed."""
    model = make()
    loggers = [
        TensorboardLogger(flush_interval=3),
        FileLogger(flush_interval=2),
        ObjectStoreLogger(order["url"], order["options"]),
        CheckpointSaver(format=model.format),
    ]
    ledger = Ledger(order["ledger"])
    limits = Limits(commit_every=0.5, linger=60.0)
    with Run(order["name"], {"rate": RATE}, loggers=loggers, dir=order["dir"], limits=limits) as run:
        found = run.latest_checkpoint()
        begin = 0
        if found is not None:
            begin = found.step
            state = found.load()
            check(state, begin)
            model.load(state)
        ledger.note("resumed", attempt=run.attempt, step=begin, version=found and found.version)
        while order["gate"] and not os.path.exists(order["gate"]):
            time.sleep(0.005)
        work = os.path.join(order["work"], str(run.attempt))
        os.makedirs(work, exist_ok=True)
        chance = random.Random(run.attempt)
        steps = itertools.count(begin + 1)
        for step in steps if order["steps"] is None else itertools.islice(steps, order["steps"]):
            loss = model.train(step)
            run.log_metrics({"loss": loss}, step=step)
            hand_over(run, ledger, work, step, chance)
            if step % 2 == 0:
                print(f"step {step}")
                run.save_checkpoint(model.state(step), step=step, metrics={"loss": loss})
                note_checkpoint(run, ledger, step)
            time.sleep(order["pause"])
        ledger.note("done", attempt=run.attempt)
        if order["wait"]:
            signal.pause()
    ledger.note("closed", attempt=run.attempt)


def hand_over(run, ledger, work, step, chance):
    """What a training logs in a step: a file of its own, one that is written anew each time, bytes, one that grows."""
    attempt = run.attempt
    sample = chance.randbytes(chance.randrange(1, 20_000))
    source = os.path.join(work, "sample.bin")
    write(source, sample)
    at = f"samples/{attempt}/{step}.bin"
    handle = run.log_asset(source, at=at, take="move" if step % 2 else "copy")
    ledger.took("asset", handle, at, sample, attempt=attempt, step=step)

    state = json.dumps({"attempt": attempt, "step": step, "noise": chance.randbytes(200).hex()}).encode()
    source = os.path.join(work, "progress.json")
    write(source, state)
    handle = run.log_asset(source)
    write(source, b"?" * len(state))  # in place: what was taken must not follow
    ledger.took("asset", handle, "progress.json", state, attempt=attempt, step=step)

    note = f"attempt {attempt}, step {step}\n".encode()
    at = f"notes/{step % 3}.txt"
    ledger.took("asset", run.log_bytes(at, note), at, note, attempt=attempt, step=step)

    source = os.path.join(work, "curve.csv")
    with open(source, "ab") as file:
        file.write(f"{step},{chance.random()}\n".encode())
    with open(source, "rb") as file:
        curve = file.read()
    at = f"curves/{attempt}.csv"
    ledger.took("grown", run.log_asset(source, at=at, take="grow"), at, curve, attempt=attempt, step=step)


def note_checkpoint(run, ledger, step):
    """The bytes of the checkpoint that was just saved, as they lie in the run's directory."""
    found = run.latest_checkpoint()
    assert found.step == step
    with open(os.path.join(found.download(), found.file), "rb") as file:
        data = file.read()
    path = f"checkpoint/{found.file}"
    facts = {"path": path, "size": len(data), "digest": blake3(data).hexdigest(), "entry": run.status()["held"]}
    ledger.note("checkpoint", **facts, attempt=run.attempt, step=step)


def write(path, data):
    """Over what is there, in place."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def live(order, make):
    """A forked training: a session of its own, and whatever it says in a file."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    said = os.open(order["said"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, source in ((0, nothing), (1, said), (2, said)):
        os.dup2(source, fd)
    code = 1
    try:
        train(order, make)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main():
    """Train what is ordered."""
    # A killed uploader is noticed, and started again, sooner than a real training needs it.
    mandapa.run.outbox._HEARTBEAT = 0.05
    mandapa.run.process._RESTART = (0.0, 0.05)
    make = use(sys.argv[1])
    model = make()
    model.train(1)  # torch loads much of itself when it is first used
    model.state(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead are gone at once
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            live(json.loads(line), make)
        print(pid, flush=True)


if __name__ == "__main__":
    mandapa.run.saving.SMALL = 0  # these states, too, are handed over in memory
    main()
