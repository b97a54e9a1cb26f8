"""Sine-wave tasks: the function that their definition says, and the same in every order."""

import math

import torch

from imaml_dist.tasks.sinusoid import Sinusoids


def test_targets_are_one_sine_wave_per_task_within_the_ranges():
    batch = Sinusoids(shots=5, queries=20, seed=3, dtype=torch.float64).episodes(7, range(300))
    assert batch.support_x.shape == (300, 5, 1) and batch.query_y.shape == (300, 20, 1)
    x, y = (
        torch.cat(pair, 1).squeeze(-1) for pair in ((batch.support_x, batch.query_x), (batch.support_y, batch.query_y))
    )
    assert float(x.abs().max()) <= 5
    # a sin(x - b) = p sin x + q cos x with a^2 = p^2 + q^2 and tan b = -q / p: a linear fit must be exact
    basis = torch.stack([x.sin(), x.cos()], -1)
    fit = torch.linalg.lstsq(basis, y.unsqueeze(-1)).solution
    torch.testing.assert_close((basis @ fit).squeeze(-1), y, rtol=1e-9, atol=1e-9)
    fit = fit.squeeze(-1)
    amplitude, phase = fit.norm(dim=1), torch.atan2(-fit[:, 1], fit[:, 0])
    assert 0.1 <= float(amplitude.min()) < 0.5 and 4.5 < float(amplitude.max()) <= 5
    assert 0 <= float(phase.min()) < 0.1 and 3.0 < float(phase.max()) <= math.pi


def test_every_bit_of_seed_step_and_task_makes_another_task():
    """Also the upper ones, which a generator's seed of 32 bits would lose."""
    base = Sinusoids(shots=2, queries=2).episodes(0, range(1))
    others = [Sinusoids(2, 2, seed=1 << bit).episodes(0, range(1)) for bit in range(63)]
    others += [Sinusoids(2, 2).episodes(1 << bit, range(1)) for bit in range(40)]
    others += [Sinusoids(2, 2).episodes(0, range(1 << bit, (1 << bit) + 1)) for bit in range(40)]
    found = [base, *others]
    assert (
        len({float(batch.support_x[0, 0]) for batch in found}) == len({int(batch.key) for batch in found}) == len(found)
    )


def test_amplitudes_phases_and_inputs_are_uniform():
    batch = Sinusoids(shots=5, queries=5, dtype=torch.float64).episodes(0, range(4000))
    fit = torch.linalg.lstsq(
        torch.cat([batch.support_x.sin(), batch.support_x.cos()], -1), batch.support_y
    ).solution.squeeze(-1)
    amplitude, phase = (fit.norm(dim=1) - 0.1) / 4.9, torch.atan2(-fit[:, 1], fit[:, 0]) / math.pi
    for drawn in (amplitude, phase, (batch.support_x.flatten() + 5) / 10, (batch.query_x.flatten() + 5) / 10):
        ordered = drawn.sort().values
        ideal = (torch.arange(len(ordered), dtype=torch.float64) + 0.5) / len(ordered)
        assert float((ordered - ideal).abs().max()) < 1.95 / len(ordered) ** 0.5  # Kolmogorov-Smirnov, a level of 0.001


def test_a_task_is_the_same_in_every_batch_and_differs_from_all_others():
    source = Sinusoids(shots=2, queries=2)
    together, alone = source.episodes(4, range(3)), source.episodes(4, range(1, 2))
    assert torch.equal(together[1:2].support_x, alone.support_x) and torch.equal(together[1:2].key, alone.key)
    others = [source.episodes(5, range(1)), Sinusoids(2, 2, seed=1).episodes(4, range(1)), together[:1], together[2:]]
    assert all(not torch.equal(other.support_x, alone.support_x) for other in others)
    assert len({int(other.key) for other in others} | {int(alone.key)}) == 5
