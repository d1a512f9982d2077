"""Passes that are recorded and replayed, by a stand-in for CUDA's recorder that runs again into the same arrays."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from moeport.backends.base import TrainingOptions
from moeport.backends.torch import graphs
from moeport.backends.torch.graphs import GraphedPass, graphed, why_not
from moeport.config.training import OptimizerConfig
from moeport.data.document_starts import document_starts
from moeport.errors import BackendUnavailableError
from tests.backends.models import training_model
from tests.model.models import VOCABULARY, batch_of, model_config, rows

OPTIONS = TrainingOptions(OptimizerConfig(), cuda_graphs="auto")
CUDA = torch.device("cuda")
TRIED = graphs.WARM_UP + 3


class Recorder:
    """Its replays write the arrays of the recording, whose inputs must be where they were; times are made up."""

    def __init__(self, parameters, waits=(), fault=None, spoil=None, replayed=0.1, host=0.9):
        self.parameters, self.waits, self.fault, self.spoil = parameters, list(waits), fault, spoil
        self.replayed, self.host = replayed, host
        self.log, self.is_replaying = [], False

    def warm(self, run):
        self.log.append("warm")
        return run()

    def record(self, run):
        self.log.append("record")
        if self.fault:
            for p in self.parameters:
                p.grad = torch.full_like(p, torch.nan)
            raise self.fault
        terms = run()
        gradients = [p.grad for p in self.parameters]

        def replay():
            self.log.append("replay")
            for p in self.parameters:
                p.grad = None
            self.is_replaying = True
            fresh = run()
            self.is_replaying = False
            new_gradients = [p.grad for p in self.parameters]
            for own, new in zip([*terms.flat(), *gradients], [*fresh.flat(), *new_gradients], strict=True):
                assert (own is None) == (new is None)
                if own is not None:
                    own.copy_(new)
            if self.spoil:
                self.spoil(gradients)

        return replay, terms

    @contextmanager
    def watch(self):
        yield self.waits

    def seconds(self, run):
        before = self.log.count("replay")
        run()
        return self.host, (self.replayed if self.log.count("replay") > before else 1.0)


def recorded(router="topk", must=False, **faults):
    """A model whose passes go through a stand-in, which is returned too, and what was said."""
    model, said = training_model(model_config(router), "float32"), []
    recorder = Recorder(list(model.module.parameters()), **faults)
    model.run_pass = GraphedPass(model._differentiated, recorder.parameters, recorder, must, said.append)
    return model, recorder, said


def train(model, steps, parts=1, documents=False):
    """The loss terms of each micro-batch, and the gradients of each step."""
    found = []
    for number in range(steps):
        batch = batch_of(model.model, seed=number)
        if documents:
            batch = replace(batch, document_BS=document_starts(batch.token_BS, number % VOCABULARY))
        size = 4 // parts
        for start in range(0, 4, size):
            terms = model.accumulate(rows(batch, start, start + size), 1 / parts)
            found.append({str(i): x for i, x in enumerate(terms.flat())})
        found.append(model.gradients())
        model.step(1e-3, model.gradient_norm())
    return found


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        assert got.keys() == want.keys()
        for name in want:
            assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(want[name])), name


def test_a_replay_masks_the_documents_of_its_batch():
    model, recorder, _ = recorded()
    expected = train(training_model(model_config("topk"), "float32"), TRIED + 2, documents=True)
    assert_same(train(model, TRIED + 2, documents=True), expected)
    assert recorder.log[-1] == "replay"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("router", ["topk", "gshard"])
def test_replays_give_what_passes_give(router, parts):
    steps = TRIED + 2
    model, recorder, said = recorded(router)
    assert_same(train(model, steps, parts), train(training_model(model_config(router), "float32"), steps, parts))
    assert recorder.log.count("record") == 1
    assert recorder.log[-1] == "replay"
    assert said == ["passes are replayed as a graph, in 0.10 of the time"]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"waits": ["router.py:7", "b"]}, "the host waits for the device in it (router.py:7)"),
        ({"host": 0.1}, "the device is busy longer than the host launches"),
        ({"fault": RuntimeError("operation not permitted when stream is capturing\nmore")}, "operation not permitted"),
        ({"fault": torch.OutOfMemoryError("no room")}, "no room"),
        ({"spoil": lambda gradients: gradients[0].add_(1)}, "it does not give the same bits"),
        ({"replayed": 0.97}, "it takes 0.97 of the time"),
    ],
)
def test_a_pass_that_cannot_be_replayed_runs_as_it_is(faults, reason):
    model, recorder, said = recorded(**faults)
    assert_same(train(model, TRIED + 1), train(training_model(model_config("topk"), "float32"), TRIED + 1))
    assert len(said) == 1
    assert said[0].startswith(f"passes are not replayed as a graph: {reason}")
    assert recorder.log.count("record") <= 1
    model, _, _ = recorded(must=True, **faults)
    if "host" in faults or "replayed" in faults:
        train(model, TRIED)
        return
    with pytest.raises(BackendUnavailableError, match="cuda_graphs: true, but a pass cannot be replayed: "):
        train(model, TRIED)


def test_what_depends_on_the_values_of_a_batch_shows_on_the_second():
    """What the host read from the first batch is in the recording, and wrong for the next."""
    model, recorder, said = recorded()
    plain, first = model._differentiated, batch_of(model.model, seed=graphs.WARM_UP + 1)

    def differentiated(batch, share):
        constant = replace(batch, target_BS=torch.as_tensor(first.target_BS))
        return plain(constant if recorder.is_replaying else batch, share)

    model.run_pass.run = differentiated
    assert_same(train(model, TRIED + 1), train(training_model(model_config("topk"), "float32"), TRIED + 1))
    assert said == ["passes are not replayed as a graph: it does not give the same bits"]
    assert recorder.log.count("replay") == 3


@pytest.mark.parametrize(("deterministic", "fault"), [(True, "it does not give the same bits"), (False, None)])
def test_where_bits_may_differ_values_are_compared(deterministic, fault, monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    x = torch.ones(3)
    assert graphs._difference([x, None], [x * (1 + 1e-6), None]) == fault
    assert graphs._difference([x], [None]) == "it has other gradients"
    assert graphs._difference([x.long()], [x.long() + 1]) == "it does not give the same bits"
    if not deterministic:
        assert graphs._difference([x], [x * 1.05]) == "it is wrong by 5.0e-02"
        assert graphs._difference([x], [x * torch.nan]) == "it is wrong by nan"


@pytest.mark.parametrize("done", [0, graphs.WARM_UP, TRIED - 1, TRIED + 1])
def test_a_profile_shows_the_parts_of_a_pass(done):
    """It may begin and end while passes are tried, which goes on afterwards."""
    model, recorder, said = recorded()
    train(model, done)
    before = len(recorder.log)
    with torch.profiler.profile():
        train(model, 3 if done else 1)
    assert len(recorder.log) == before
    train(model, max(TRIED - done, 0) + 1)
    assert recorder.log[-1] == "replay"
    assert len(said) == 1


@pytest.mark.parametrize(
    ("options", "device", "ranks", "reason"),
    [
        (OPTIONS, torch.device("cpu"), 1, "the device is cpu; expected cuda"),
        (OPTIONS, CUDA, 2, "2 ranks train together; expected one"),
        (replace(OPTIONS, compile=True), CUDA, 1, "backend.compile is true; expected one of the two"),
        (
            replace(OPTIONS, activation_checkpointing=True),
            CUDA,
            1,
            "training.activation_checkpointing is true; expected false",
        ),
        (OPTIONS, CUDA, 1, None),
    ],
)
def test_why_no_pass_is_recorded(options, device, ranks, reason):
    assert why_not(options, device, ranks) == reason
    run: Any = None
    if reason:
        assert graphed(run, [], options, device, ranks, print) is run
        with pytest.raises(BackendUnavailableError, match="cuda_graphs: true cannot be: "):
            graphed(run, [], replace(options, cuda_graphs=True), device, ranks, print)
