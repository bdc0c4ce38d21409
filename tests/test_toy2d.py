"""toy2d.py: the two games, the two samplers, what each lesson asks for, and the numbers behind the pictures."""
import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import toy2d
from toy2d import energy_distance, langevin_2d, maximin, minimax, off_support, payoff, pgd_2d, sample_data, sample_p0

SMOKE = toy2d.SETTINGS["gaussian", "smoke"]


@pytest.fixture(autouse=True)
def threads():
    """main sets their number for its process; the tests that follow want theirs back."""
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.fixture
def float64():
    """Rounding must not decide: Adam's first steps have one length, however small the gradient."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def settings(**changes):
    return dataclasses.replace(SMOKE, **changes)


class Plane(nn.Module):
    def forward(self, x):
        return 3 * x[:, 0] + 4 * x[:, 1]


def same(f, g):
    return all(torch.equal(p, q) for p, q in zip(f.parameters(), g.parameters()))


# --- the samplers ---


def test_pgd_closed_form():
    x = torch.randn(5, 2)
    assert torch.allclose(pgd_2d(Plane(), x, 4, 0.5), x + 2 * torch.tensor([0.6, 0.8]), atol=1e-6)
    assert torch.equal(pgd_2d(lambda x: 0 * x.sum(1), x, 4, 0.5), x)


def test_langevin_is_stationary_at_its_known_variance():
    """f = -|x|^2/2: x <- (1 - h/2) x + sqrt(h) z has variance 1 / (1 - h/4)."""
    h = 0.5
    x = langevin_2d(lambda x: -x.pow(2).sum(1) / 2, torch.zeros(40_000, 2), 60, math.sqrt(h))
    assert abs(x.var().item() * (1 - h / 4) - 1) < 0.02 and x.mean().abs() < 0.02


def test_langevin_steps_are_as_many_as_asked_for():
    x = langevin_2d(lambda x: 0 * x.sum(1), torch.zeros(20_000, 2), 9, 0.1)
    assert abs(x.std().item() / 0.3 - 1) < 0.02


def test_chains_are_kept_and_a_share_begins_anew(monkeypatch):
    """Without noise and slope a chain stays where it is: the bank holds what began anew, and nothing else is lost."""
    monkeypatch.setattr(toy2d, "langevin_2d", lambda f, x, steps, noise: seen.append((x, steps, noise)) or x + 100)
    seen, s = [], settings(noise=0.3)
    monkeypatch.setattr(toy2d, "sample_p0", lambda where, n: torch.zeros(n, 2))
    sampler = toy2d.persistent_chains(s, 7, 0.25)
    x0 = torch.full((2000, 2), 5.0)
    out = sampler("f", x0)
    begun, steps, noise = seen[0]
    assert (steps, noise) == (7, 0.3) and torch.equal(out, begun + 100)
    anew = (begun == 5).all(1)
    assert abs(anew.float().mean().item() - 0.25) < 0.05 and (begun[~anew] == 0).all()
    for _ in range(3):
        sampler("f", x0)
    assert (seen[-1][0] >= 100).any()  # what chains had become is where they go on
    assert all(((x == 5).all(1)).any() for x, _, _ in seen)
    kept = toy2d.persistent_chains(s, 7, 0.0)
    seen.clear()
    kept("f", x0)
    assert (seen[0][0] == 0).all()


# --- the objectives ---


def test_loss_is_the_mean_of_2m_cross_entropies():
    a, b = torch.randn(5), torch.randn(5)
    bce = F.binary_cross_entropy_with_logits(torch.cat([a, b]), torch.cat([torch.ones(5), torch.zeros(5)]))
    assert torch.allclose(toy2d.at_loss(a, b), bce)
    assert torch.allclose(toy2d.ebm_loss(a, b), b.mean() - a.mean())


def test_payoff_of_an_undecided_d_is_minus_log_4_and_rises_with_a_right_one():
    x = torch.randn(10, 2)
    assert math.isclose(payoff(lambda x: 0 * x.sum(1), x, x), -math.log(4), rel_tol=1e-6)
    right = payoff(lambda x: 2 * x[:, 0], torch.full((4, 2), 1.0), torch.full((4, 2), -1.0))
    assert math.isclose(right, 2 * math.log(1 / (1 + math.exp(-2))), rel_tol=1e-5)


# --- data ---


@pytest.mark.parametrize("name", ["gaussian", "ring", "grid", "spirals", "checkerboard"])
def test_data_sets_lie_in_the_plane(name):
    x = sample_data(name, 2000)
    assert x.shape == (2000, 2) and x.abs().max() < toy2d.SIDE and x.std(0).min() > 0.1


def test_shapes_of_the_data_sets():
    cell = ((sample_data("checkerboard", 4000) + 1.5) / 0.75).long()
    assert (cell.sum(1) % 2 == 0).all() and len(cell.unique(dim=0)) == 8
    assert abs(sample_data("ring", 4000).norm(dim=1).mean().item() - 1.2) < 0.02
    assert abs(sample_data("gaussian", 4000).std().item() - toy2d.STD) < 0.01
    assert len((sample_data("grid", 4000) / 0.6).round().unique(dim=0)) == 25


def test_p0_is_uniform_or_in_the_corner():
    corner, uniform = sample_p0("corner", 500), sample_p0("uniform", 4000)
    assert (corner < 0).all() and (corner.mean(0) + 1.1).abs().max() < 0.05
    assert uniform.mean().abs() < 0.1 and uniform.min() < -1.9 and uniform.max() > 1.9


# --- Algorithm 1 ---


def by_hand(s, data, where, seed, objective, rates):
    """Algorithm 1 written out, with these learning rates -> (f before, f after)."""
    torch.manual_seed(seed)
    f, before = toy2d.make_f(s.width), toy2d.make_f(s.width)
    before.load_state_dict(f.state_dict())
    optimizer = torch.optim.Adam(f.parameters(), betas=(0.0, 0.99))
    for rate in rates:
        x = sample_data(data, s.m)
        x_adv = sample_p0(where, s.m)
        for _ in range(s.k):
            x_adv.requires_grad_(True)
            (g,) = torch.autograd.grad(f(x_adv).sum(), x_adv)
            x_adv = x_adv.detach() + s.step * g / g.norm(dim=1, keepdim=True)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        objective(f(x), f(x_adv)).backward()
        optimizer.step()
    return before, f


@pytest.mark.parametrize("data, where, objective", [("gaussian", "corner", "at_loss"), ("ring", "uniform", "ebm_loss")])
def test_maximin_is_algorithm_1(float64, data, where, objective):
    """Its data, its p0, fresh draws, its attack, and a learning rate that falls to 0 along a cosine."""
    s, objective = settings(updates=4, k=2, width=16, lr=0.01), getattr(toy2d, objective)
    rates = [0.01 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    before, f, gaps = maximin(5, s, data, where, objective)
    expected = by_hand(s, data, where, 5, objective, rates)
    assert same(before, expected[0]) and not same(before, f) and len(gaps) == 4
    for mine, theirs in zip(f.parameters(), expected[1].parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_maximin_uses_the_sampler_it_is_given_and_reports_the_gap():
    s, asked = settings(updates=2, width=16), []

    def sampler(f, x0):
        asked.append(x0)
        return torch.full_like(x0, 1.5)

    torch.manual_seed(0)
    start, _ = toy2d.make_f(16), toy2d.make_f(16)
    x = sample_data("gaussian", s.m)
    _, _, gaps = maximin(0, s, "gaussian", "corner", sampler=sampler)
    with torch.no_grad():
        expected = start(x).mean() - start(torch.full((1, 2), 1.5)).mean()
    assert math.isclose(gaps[0], expected.item(), abs_tol=1e-5)
    assert len(asked) == 2 and all((x0 < 0).all() for x0 in asked) and not torch.equal(*asked)


def test_a_runaway_stops_with_its_gaps():
    with pytest.raises(common.Diverged) as caught:
        maximin(0, settings(updates=50, lr=10.0, width=32), "gaussian", "uniform", toy2d.ebm_loss)
    assert 1 < len(caught.value.rows) < 50 and not abs(caught.value.rows[-1]) < 1e6


def test_ebm_objective_is_unbounded_and_at_is_not():
    s = settings(updates=80, lr=1e-2)
    _, _, bounded = maximin(0, s, "gaussian", "uniform")
    try:
        _, _, unbounded = maximin(0, s, "gaussian", "uniform", toy2d.ebm_loss)
    except common.Diverged as stop:
        unbounded = stop.rows
    assert max(map(abs, unbounded)) > 100 * max(map(abs, bounded))


# --- Algorithm 2 ---


def test_minimax_is_algorithm_2(float64):
    """D is trained ten times as long at first; then a step of all particles, kept; whole steps in the first half."""
    s = settings(rounds=4, inner=2, particles=50, particle_step=0.25, width=16)
    torch.manual_seed(2)
    f = toy2d.make_f(16)
    x, particles = sample_data("ring", 50), sample_p0("corner", 50)
    start = particles
    optimizer = torch.optim.Adam(f.parameters(), s.lr, betas=(0.0, 0.99))
    for updates, step in ((20, 0.25), (2, 0.25), (2, 0.25), (2, 0.125)):
        for _ in range(updates):
            optimizer.zero_grad()
            toy2d.at_loss(f(x), f(particles)).backward()
            optimizer.step()
        particles = pgd_2d(f, particles, 1, step)
        if updates == 20:
            early = [p.clone() for p in f.parameters()]
    first, last, its_x, its_start, end = minimax(2, s, "ring", "corner")
    assert torch.equal(its_x, x) and torch.equal(its_start, start)
    assert torch.allclose(end, particles, atol=1e-6)
    for mine, theirs in zip([*first.parameters(), *last.parameters()], [*early, *f.parameters()]):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_particles_approach_the_data_and_maximin_raises_f_on_it():
    s = settings(rounds=30, inner=5, particle_step=0.06, particles=200, updates=90, k=14, width=64, lr=2e-3)
    _, _, x, start, end = minimax(0, s, "gaussian", "corner")
    assert energy_distance(end, x) < 0.6 * energy_distance(start, x)
    _, f, _ = maximin(0, s, "gaussian", "uniform")
    with torch.no_grad():
        assert f(sample_data("gaussian", 500)).mean() > f(sample_p0("uniform", 500)).mean() + 0.1


# --- numbers ---


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


def test_a_largest_value_on_the_edge_is_no_maximum():
    """f = x + y rises without end; a bump whose top is outside the plane."""
    for f in (lambda x: x.sum(1), lambda x: 9 - (x - 2.2).pow(2).sum(1), lambda x: x[:, 0]):
        largest, maxima = off_support(f, "gaussian")
        assert largest > 0.8 and len(maxima) == 0
    assert toy2d.largest_on_edge(lambda x: x.sum(1), 1) == 4 and toy2d.largest_on_edge(lambda x: x.sum(1), 4) == 16


def test_a_constant_rate_does_not_fall(float64):
    """A loss of gradient one: each update moves Adam's weights by the rate."""
    for falling in (True, False):
        rates, step = [], torch.optim.Adam.step

        def recorded(self, *rest):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *rest)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.Adam, "step", recorded)
            maximin(0, settings(updates=4, lr=0.5, width=4), "gaussian", "uniform", falling=falling)
        assert (rates == [0.5] * 4) != falling and rates[0] == 0.5


def test_a_plateau_of_d_is_not_a_crowd_of_maxima():
    """Where D is 1 to the last bit its logit still has one top."""
    assert len(off_support(lambda x: 60 - x.pow(2).sum(1) + 3 * x.sum(1), "gaussian")[1]) == 1


# --- what the lessons ask for ---


class Slope(nn.Module):
    """f = a log p_data + b on the Gaussian."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, x):
        return -self.a * x.pow(2).sum(1) / (2 * toy2d.STD**2) + 3


@pytest.fixture
def asked(monkeypatch):
    """maximin is recorded and returns networks of known slope; nothing is drawn."""
    calls = []

    def recorded(seed, s, data, where, objective=toy2d.at_loss, sampler=None, falling=True):
        calls.append((seed, s, data, where, objective, sampler, falling))
        return Slope(0.0), Slope(0.25 * len(calls)), [0.5, -2.0 * len(calls), 1.0]

    monkeypatch.setattr(toy2d, "maximin", recorded)
    monkeypatch.setattr(toy2d, "draw_plane", lambda *arguments: None)
    return calls


RUN = SimpleNamespace(seed=4, save=lambda figure, name: toy2d.plt.close(figure))


def test_figure_2_1_asks_for_both_p0(asked):
    s = settings(images=3000)
    found = {row["quantity"]: row["value"] for row in toy2d.figure_2_1(RUN, s, "ring")}
    assert [call[:5] for call in asked] == [(4, s, "ring", where, toy2d.at_loss) for where in ("uniform", "corner")]
    x = sample_data("ring", 3000)
    for where, a in (("uniform", 0.25), ("corner", 0.5)):
        expected = Slope(a)(x).sigmoid()
        assert abs(found[f"mean D on the support, {where} p0"] - expected.mean().item()) < 0.02
        assert abs(found[f"std of D there, {where} p0"] - expected.std().item()) < 0.02
        attacked = pgd_2d(Slope(a), sample_p0(where, 3000), s.k, s.step)
        assert abs(found[f"U, {where} p0"] - payoff(Slope(a), x, attacked)) < 0.1


def test_figure_2_2_asks_for_both_p0(monkeypatch):
    calls = []
    data, far = torch.randn(50, 2) * 0.2, torch.randn(50, 2) * 0.2 - 1

    def recorded(seed, s, data_name, where):
        calls.append((seed, s, data_name, where))
        return Slope(0.0), Slope(1.0), data, far, data + 0.01

    monkeypatch.setattr(toy2d, "minimax", recorded)
    monkeypatch.setattr(toy2d, "draw_plane", lambda *arguments: None)
    found = {row["quantity"]: row["value"] for row in toy2d.figure_2_2(RUN, SMOKE, "grid")}
    assert calls == [(4, SMOKE, "grid", "uniform"), (4, SMOKE, "grid", "corner")]
    for where in ("uniform", "corner"):
        assert math.isclose(found[f"energy distance to the data, {where} p0"], energy_distance(data + 0.01, data))
        assert math.isclose(found[f"the same at the start, {where} p0"], energy_distance(far, data))
        assert math.isclose(found[f"U, {where} p0"], payoff(Slope(1.0), data, data + 0.01), rel_tol=1e-6)
        mean = Slope(1.0)(data).sigmoid().mean().item()
        assert math.isclose(found[f"mean D on the support, {where} p0"], mean, rel_tol=1e-6)


def test_objectives_change_the_objective_alone(asked):
    rows = toy2d.objectives(RUN, SMOKE, "spirals")
    assert [call[2:] for call in asked] == [
        ("spirals", "uniform", objective, None, False) for objective in (toy2d.at_loss, toy2d.ebm_loss, toy2d.ebm_loss)]
    assert [call[1] for call in asked] == [SMOKE, SMOKE, settings(lr=SMOKE.lr / 10, updates=10 * SMOKE.updates)]
    assert [row["value"] for row in rows] == [1.0] * 3 and [row["updates"] for row in rows] == [3, 3, 3]


def test_objectives_keep_what_diverged(monkeypatch):
    def runs_away(*arguments, **options):
        stop = common.Diverged("too large")
        stop.rows = [1.0, -7.0]
        raise stop

    monkeypatch.setattr(toy2d, "maximin", runs_away)
    rows = toy2d.objectives(RUN, SMOKE, "gaussian")
    assert [(row["value"], row["updates"]) for row in rows] == [(-7.0, 2)] * 3


def test_samplers_measure_the_slope_against_the_log_density(asked, monkeypatch):
    kept = []
    monkeypatch.setattr(toy2d, "persistent_chains", lambda s, steps, restart: kept.append((steps, restart)) or "kept")
    rows = toy2d.samplers(RUN, SMOKE)
    assert [call[2:] for call in asked] == [("gaussian", "uniform", toy2d.at_loss, None, True),
                                            ("gaussian", "uniform", toy2d.ebm_loss, "kept", True)]
    assert kept == [(SMOKE.k, 0.05)]
    assert [round(row["value"], 4) for row in rows] == [0.25, 0.5]
    assert "AT" in rows[0]["quantity"] and "EBM" in rows[1]["quantity"]


def test_energies_run_on_for_longer_than_training(asked, monkeypatch):
    monkeypatch.setattr(toy2d, "persistent_chains", lambda s, steps, restart: ("kept", steps, restart))
    walked, real = [], toy2d.langevin_2d

    def recorded(f, x, steps, noise):
        walked.append((f.a.item(), steps, noise))
        return real(f, x, min(steps, 3), noise)

    monkeypatch.setattr(toy2d, "langevin_2d", recorded)
    rows = toy2d.energies(RUN, SMOKE, "gaussian")
    assert walked == [(0.25, 5, 0.1), (0.25, 495, 0.1), (0.5, 500, 0.1), (0.5, 4500, 0.1)]
    assert [row["steps"] for row in rows] == [5, 500, 500, 5000]
    for call in asked:
        assert call[1:5] == (settings(lr=SMOKE.lr / 5), "ring", "uniform", toy2d.ebm_loss)
    assert asked[1][5] == ("kept", 20, 0.02)
    walked.clear()
    asked[0][5](Slope(1.0), torch.zeros(3, 2))
    assert walked == [(1.0, 5, 0.1)]
    toy2d.energies(RUN, SMOKE, "grid")
    assert asked[-1][2] == "grid"


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    assert outcome(toy2d, "--budget", "smoke", "--out", tmp_path, "--only", *toy2d.EXPERIMENTS) == (0, "")
    results = json.loads((tmp_path / "toy2d-gaussian" / "results.json").read_text())
    assert set(results) == set(toy2d.EXPERIMENTS)
    for name in toy2d.EXPERIMENTS:
        assert (tmp_path / "toy2d-gaussian" / f"{name}.png").exists()
        assert all(math.isfinite(row["value"]) for row in results[name]["rows"])


def test_main_hands_on_the_data_set_and_runs_on_the_processor(tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: given.update(have, run=self))
    toy2d.main(["--data", "grid", "--budget", "smoke", "--out", tmp_path, "--seed", 3])
    assert given["data"] == "grid" and given["run"].device.type == "cpu" and given["run"].seed == 3
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("flags, says", [(["--data", "moons"], "moons"), (["--only", "figure9"], "figure9"),
                                         (["--m", "0"], "--m"), (["--step", "-1"], "--step"),
                                         (["--budget", "paper"], "paper"), (["--rounds", "0"], "--rounds"),
                                         (["--particles", "1"], "--particles"), (["--images", "1"], "--images"),
                                         (["--noise", "0"], "--noise"), (["--k", "-1"], "--k")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags, says):
    code, said = outcome(toy2d, "--budget", "smoke", "--out", tmp_path / "runs", *flags)
    assert code == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()
