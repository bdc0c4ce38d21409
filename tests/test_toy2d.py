"""toy2d.py: the two games, the two samplers, and the numbers behind the pictures."""
import json
import math

import pytest
import torch
from torch import nn

import toy2d
from toy2d import energy_distance, langevin, maximin, minimax, off_support, pgd, sample_data, sample_p0, value


def settings(**changes):
    return toy2d.dataclasses.replace(toy2d.SMOKE, **changes)


class Plane(nn.Module):
    def forward(self, x):
        return 3 * x[:, 0] + 4 * x[:, 1]


def test_pgd_closed_form():
    x = torch.randn(5, 2)
    assert torch.allclose(pgd(Plane(), x, 4, 0.5), x + 2 * torch.tensor([0.6, 0.8]), atol=1e-6)
    assert torch.equal(pgd(lambda x: 0 * x.sum(1), x, 4, 0.5), x)


def test_langevin_is_stationary_at_its_known_variance():
    """f = -|x|^2/2: x <- (1 - h/2) x + sqrt(h) z has variance 1 / (1 - h/4)."""
    h = 0.5
    x = langevin(lambda x: -x.pow(2).sum(1) / 2, torch.zeros(40_000, 2), 60, math.sqrt(h))
    assert abs(x.var().item() * (1 - h / 4) - 1) < 0.02 and x.mean().abs() < 0.02


def test_value_of_an_undecided_d_is_minus_log_4():
    x = torch.randn(10, 2)
    assert math.isclose(value(lambda x: 0 * x.sum(1), x, x), -math.log(4), rel_tol=1e-6)


def test_energy_distance():
    a, b = torch.zeros(50, 2), torch.zeros(60, 2) + torch.tensor([3.0, 4.0])
    assert math.isclose(energy_distance(a, b), 10.0, rel_tol=1e-6)
    assert abs(energy_distance(torch.randn(3000, 2), torch.randn(3000, 2))) < 0.01


def test_maxima_off_the_support_are_found():
    """Two bumps off the data, one on it, one off it but below 1/2."""
    places = torch.tensor([[1.5, 1.5], [-1.5, 1.0], [0.0, 0.0], [1.5, -1.5]])
    heights = torch.tensor([6.0, 5.0, 9.0, 2.5])

    def f(x):
        return (heights * torch.exp(-torch.cdist(x, places).pow(2) / 0.02)).sum(1) - 3
    largest, maxima = off_support(f, "gaussian")
    assert {tuple(round(v, 1) for v in row[:2]) for row in maxima.tolist()} == {(1.5, 1.5), (-1.5, 1.0)}
    assert math.isclose(largest, 1 / (1 + math.exp(-3)), rel_tol=1e-3)


def test_a_plateau_of_d_is_not_a_crowd_of_maxima():
    """Where D is 1 to the last bit its logit still has one top."""
    assert len(off_support(lambda x: 60 - x.pow(2).sum(1) + 3 * x.sum(1), "gaussian")[1]) == 1


@pytest.mark.parametrize("name", list(toy2d.SETTINGS))
def test_data_sets_lie_in_the_plane(name):
    x = sample_data(name, 2000)
    assert x.shape == (2000, 2) and x.abs().max() < toy2d.SIDE and x.std(0).min() > 0.1


def test_checkerboard_and_corner():
    cell = ((sample_data("checkerboard", 4000) + 1.5) / 0.75).long()
    assert (cell.sum(1) % 2 == 0).all() and len(cell.unique(dim=0)) == 8
    assert (sample_p0("corner", 500) < 0).all() and sample_p0("uniform", 2000).mean().abs() < 0.2


def test_particles_move_one_step_a_round_and_are_kept():
    s = settings(rounds=1, inner=1, particle_step=0.25)
    _, _, _, start, end = minimax(s, "gaussian", "uniform")
    assert torch.allclose((end - start).norm(dim=1), torch.full((len(start),), 0.25), atol=1e-5)


def test_particles_approach_the_data_and_maximin_raises_f_on_it():
    s = settings(rounds=30, inner=10, particle_step=0.06, updates=120, k=14)
    _, _, x, start, end = minimax(s, "gaussian", "corner")
    assert energy_distance(end, x) < 0.6 * energy_distance(start, x)
    _, f, gaps = maximin(s, "gaussian", "uniform")
    with torch.no_grad():
        assert f(sample_data("gaussian", 500)).mean() > f(sample_p0("uniform", 500)).mean() + 0.15
    assert len(gaps) == 120


def test_ebm_objective_is_unbounded_and_at_is_not():
    s = settings(updates=80, k=3)
    bounded = maximin(s, "gaussian", "uniform", lr=1e-2)[2]
    try:
        unbounded = maximin(s, "gaussian", "uniform", toy2d.ebm_loss, lr=1e-2)[2]
    except toy2d.Diverged as stop:
        unbounded = stop.rows
    assert max(map(abs, unbounded)) > 100 * max(map(abs, bounded))


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    assert outcome(toy2d, "--budget", "smoke", "--out", tmp_path, "--only", *toy2d.EXPERIMENTS) == (0, "")
    results = json.loads((tmp_path / "toy2d-gaussian" / "results.json").read_text())
    assert set(results) == set(toy2d.EXPERIMENTS)
    for name in toy2d.EXPERIMENTS:
        assert (tmp_path / "toy2d-gaussian" / f"{name}.png").stat().st_size > 5000
        assert results[name]["ours"]["sentence"].endswith(".")


@pytest.mark.parametrize("flags, says", [(["--data", "moons"], "known: gaussian"),
                                         (["--only", "figure9"], "unknown experiment"),
                                         (["--m", "0"], "--m"), (["--step", "-1"], "at least 0")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags, says):
    code, said = outcome(toy2d, "--budget", "smoke", "--out", tmp_path, *flags)
    assert code == 2 and says in said and said.count("\n") == 1
