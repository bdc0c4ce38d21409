"""fixer.py: the pairs, both phases, what each attack sees of G, every table and figure, the energy, the script as a whole."""
import copy
import dataclasses
import functools
import json
import math
import subprocess
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import fixer
from common import Training, UserError
from conftest import FakeRun, Killed, TinyTorchvision
from fixer import Attack, Defence, LInf, Outcome, behind, chain_and_fixer, purified, train_phase

SMOKE = fixer.SETTINGS["glyphs", "smoke"]
BALL = LInf(0.1, 0.025)
ATTACK = Attack(BALL, 20, 6, 24)


@pytest.fixture(autouse=True)
def no_weights_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "run", smoke=True)


class Blend(nn.Module):
    """A Fixer of known derivative: a x + b."""

    def __init__(self, a, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.as_tensor(a)), b

    def forward(self, x):
        return self.a * x + self.b


def shifted(x, steps, by=0.25):
    return x + by


def noisy(x, steps, size=0.2):
    return x + size * steps * torch.randn_like(x)


def images(n, name="pairs", seed=1, side=8):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8, generator=g)
    return common.Images(x, torch.arange(n) % 10, name)


def settings(**changes):
    return dataclasses.replace(SMOKE, **changes)


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def rows_of(rows):
    return {row["quantity"]: row["value"] for row in rows}


# --- the network ---


@pytest.mark.parametrize("channels, side", [(1, 28), (3, 32)])
def test_g_is_the_identity_before_training_and_never_clamps(channels, side):
    G, x = fixer.Fixer(channels, 8), 3 * torch.randn(4, channels, side, side)
    for mode in (True, False):
        assert torch.equal(G.train(mode)(x), x)
    F.mse_loss(G.train()(x), torch.zeros_like(x)).backward()
    assert G.body[-1].weight.grad.abs().sum() > 0  # and yet it can learn
    with torch.no_grad():
        G.body[-1].weight += 0.1
        G.eval()
        assert torch.allclose(G(x), x + G.body(2 * x - 1) / 2) and not torch.allclose(G(x), x)
    assert not any(isinstance(m, nn.Upsample) for m in G.modules())


def test_its_size_and_its_start():
    G = fixer.Fixer(3, 64)
    assert sum(p.numel() for p in G.parameters()) == 300_099
    assert [type(layer) for layer in G.body] == [nn.Conv2d, *4 * [common.GBlock], nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert all(m.bias.abs().max() == 0 for m in G.modules() if isinstance(m, nn.Conv2d))  # Glorot, as everywhere
    assert G.body[0].weight.std().item() == pytest.approx((2 / (27 + 9 * 64)) ** 0.5, rel=0.1)


# --- pairs ---


def test_pairs_are_the_ends_of_the_chains_in_order(run, monkeypatch):
    monkeypatch.setattr(fixer, "PART", 5)
    run.chunk = 2
    data = images(12)
    z = purified(run, partial(noisy, size=0.01), data, 3)
    assert z.dtype == torch.float16 and z.shape == (12, 1, 8, 8)
    moved = z.float() - data.take(slice(None))
    assert moved.std() == pytest.approx(0.03, rel=0.1)  # three steps, and each pair is of one image
    torch.manual_seed(12)
    ends = torch.cat([noisy(part, 3, size=0.01) for part in data.take(slice(None)).split([2, 2, 1, 2, 2, 1, 2])])
    assert torch.equal(z, ends.half())


def test_pairs_are_kept_and_drawn_anew(run):
    data, calls = images(6), []

    def counted(x, steps):
        calls.append(steps)
        return noisy(x, steps)
    torch.manual_seed(77)
    first = purified(run, counted, data, 2)
    torch.manual_seed(78)
    assert torch.equal(purified(run, counted, data, 2), first) and calls == [2]
    second = purified(run, counted, data, 2, draw=1)
    assert not torch.equal(first, second) and calls == [2, 2]
    assert torch.equal(purified(run, counted, data, 2), first) and calls == [2, 2]
    run.seed = 1
    with pytest.raises(UserError, match="seed"):
        purified(run, counted, data, 2)
    run.folder = run.folder / "another"
    run.folder.mkdir()
    assert not torch.equal(purified(run, counted, data, 2), first)  # --seed draws other chains


def test_the_order_of_pairs_depends_on_the_seed_and_the_epoch(run, monkeypatch):
    asked, real = [], common.shuffled
    monkeypatch.setattr(common, "shuffled", lambda n, seed: asked.append(seed) or real(n, seed))
    run.seed = 30
    phase(run)
    assert [seed for seed in asked if seed > 29] == [31, 32]


def test_pairs_of_another_energy_tau_temperature_k_or_images_are_refused(run):
    V = common.frozen_copy(common.make_net("light_ebm", 1, (1, 28, 28), 1 / 16))
    data = images(4, side=28)
    own = {"V": V, "tau": 0.1, "T": 1e-4}
    first = purified(run, partial(fixer.langevin, **own), data, 2)
    assert torch.equal(purified(run, partial(fixer.langevin, **own), data, 2), first)
    other = copy.deepcopy(V)
    with torch.no_grad():
        other.net.body[0].weight += 1
    for change in ({"V": other}, {"tau": 0.2}, {"T": 2e-4}):
        with pytest.raises(UserError, match="made with"):
            purified(run, partial(fixer.langevin, **{**own, **change}), data, 2)
    with pytest.raises(UserError, match="images"):
        purified(run, partial(fixer.langevin, **own), images(4, seed=2, side=28), 2)
    file = run.folder / "pairs-2-0.pt"
    file.rename(run.folder / "pairs-3-0.pt")
    with pytest.raises(UserError, match="K 2 .now 3"):
        purified(run, partial(fixer.langevin, **own), data, 3)


def test_interrupted_pairs_go_on_bit_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(fixer, "PART", 3)
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    data, calls, dies = images(8), [], [False]

    def dying(x, steps):
        calls.append(len(x))
        if dies[0] and len(calls) == 3:
            raise Killed
        return noisy(x, steps)
    expected = purified(FakeRun(tmp_path / "whole", smoke=True), dying, data, 2, draw=1)
    calls.clear()
    dies[0] = True
    with pytest.raises(Killed):
        purified(FakeRun(tmp_path / "broken", smoke=True), dying, data, 2, draw=1)
    dies[0] = False
    calls.clear()
    torch.manual_seed(99)
    assert torch.equal(purified(FakeRun(tmp_path / "broken", smoke=True), dying, data, 2, draw=1), expected)
    assert calls == [2]  # the last part alone


def test_chains_that_run_away_stop_the_run(run):
    with pytest.raises(common.Diverged, match="lower --tau"):
        purified(run, partial(shifted, by=math.inf), images(4), 2)


# --- losses ---


def test_perceptual_loss_against_a_hand_count():
    """phi: sums of pairs of columns, and their negatives; C = 2, H = 1, W = 2. Images are shifted by 1, halved."""
    def layers(x):
        sums = (2 * x + 1).unflatten(3, (2, 2)).sum(4)  # [B, 1, 1, 2]
        return torch.cat([sums, -sums], 1)
    x = torch.tensor([[[[1., 2., 3., 4.]]], [[[0., 0., 0., 1.]]]])
    target = torch.tensor([[[[0., 2., 3., 3.]]], [[[0., 0., 0., 0.]]]])
    by_hand = [(1 + 1 + 1 + 1) / (2 * 1 * 2), (0 + 1 + 0 + 1) / (2 * 1 * 2)]
    loss = fixer.perceptual_loss(x, target, layers, 1, 2)
    assert loss.item() == pytest.approx(sum(by_hand) / 2)


@pytest.mark.parametrize("name, layers", [("small_cnn", 9), ("wrn16", 5), ("wrn28", 9)])
def test_without_vgg_the_loss_network_is_the_front_of_f(name, layers):
    f = common.make_net(name, 10, (3, 32, 32), 1).eval().requires_grad_(False)
    loss = fixer.make_perceptual(None, f, "cpu")
    x, target = torch.rand(2, 3, 3, 32, 32)
    maps = [f.body[:layers](2 * image - 1) for image in (x, target)]
    assert loss(x, target).item() == pytest.approx(F.mse_loss(*maps).item(), rel=1e-4)


class Slim(nn.Module):
    """In place of torchvision's VGG-16, whose file has half a gigabyte."""

    def __init__(self, **_):
        super().__init__()
        layers = []
        for c_in, c_out in ((3, 4), (4, 4), (4, 6), (6, 6), (6, 6)):
            layers += [nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out)]
        self.features = nn.Sequential(*layers)


def vgg_file(folder, monkeypatch):
    monkeypatch.setattr(fixer.torchvision.models, "vgg16", Slim)
    made, file = Slim(), folder / "vgg16-397923af.pth"
    folder.mkdir(exist_ok=True)
    torch.save(made.state_dict(), file)
    return made, file


def test_the_loss_network_is_vgg_where_its_weights_are(tmp_path, monkeypatch):
    made, file = vgg_file(tmp_path / "data", monkeypatch)
    loss = fixer.make_perceptual(file, None, "cpu")
    x, target = torch.rand(2, 3, 1, 8, 8)
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in ((.485, .456, .406), (.229, .224, .225)))
    made.eval()
    maps = [made.features[:9]((image.expand(-1, 3, -1, -1) - mean) / std) for image in (x, target)]
    assert loss(x, target).item() == pytest.approx(F.mse_loss(*maps).item(), rel=1e-4)
    assert not any(p.requires_grad for p in loss.keywords["layers"].parameters())
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="VGG-16"):
        fixer.make_perceptual(file, None, "cpu")


def test_the_mean_loss_counts_every_pair_once_in_eval_mode(run, exact):
    data, z = images(5), torch.randn(5, 1, 8, 8).half()
    G = fixer.Fixer(1, 4)
    with torch.no_grad():
        G.body[-1].weight += 0.1
    fixed = G.eval()(z.float())
    expected = F.mse_loss(fixed, data.take(slice(None))).item()
    found = fixer.mean_loss(run, settings(batch=2), F.mse_loss, G.train(), z, data)
    assert found == pytest.approx(expected, rel=1e-5) and not G.training


# --- the two phases ---


def phase(run, s=None, chain=noisy, loss=F.mse_loss, epochs=2, **more):
    given = {"learned": images(8), "held": images(5, "held", 2), "K": 2, **more}
    return train_phase(run, s or settings(lr=0.01), "g", chain, loss=loss, epochs=epochs, **given)


def test_training_by_hand(run, exact):
    """Two epochs of Adam on shuffled pairs of the second and third draw, in train mode, against the plain loop."""
    s = settings(lr=0.01, batch=3, refresh=1, mse_epochs=1, patience=9)
    start = fixer.Fixer(1, 3)
    with torch.no_grad():
        start.body[-1].weight.normal_(0, 0.1)
    before = copy.deepcopy(start)
    found = phase(run, s, start=start, early=False)
    assert same(start, before)

    learned, held, G = images(8), images(5, "held", 2), copy.deepcopy(start).train()
    adam = torch.optim.Adam(G.parameters(), 0.01)
    losses = []
    for epoch in (1, 2):
        z = purified(run, noisy, learned, 2, draw=epoch).float()
        seen = []
        for rows in common.shuffled(8, epoch).split(3)[:2]:
            loss = F.mse_loss(G.train()(z[rows]), learned.take(rows))
            adam.zero_grad()
            loss.backward()
            adam.step()
            seen.append(loss.item())
        z_held = purified(run, noisy, held, 2).float()
        with torch.no_grad():
            losses.append([sum(seen) / 2, F.mse_loss(G.eval()(z_held), held.take(slice(None))).item()])
    assert all(torch.allclose(v.float(), found.state_dict()[k].float(), atol=1e-5) for k, v in G.state_dict().items())
    assert torch.allclose(torch.tensor(found.losses), torch.tensor(losses), rtol=1e-4)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("early", [True, False])
def test_the_weights_of_the_lowest_validation_loss_are_kept(run, monkeypatch, early):
    """Losses after epochs 1 to 6; patience 2: it ends after epoch 4, and keeps epoch 2."""
    made_up, after, asked = [4.0, 3.0, 3.5, 3.2, 1.0, 2.0], [], []

    def mean_loss(run, s, loss, G, z, data):
        after.append(copy.deepcopy(G))
        asked.append((z, data))
        return made_up[len(after) - 1]
    monkeypatch.setattr(fixer, "mean_loss", mean_loss)
    s = settings(lr=0.01, patience=2, refresh=1)
    G = phase(run, s, epochs=6, early=early)
    epochs = 4 if early else 6
    assert len(after) == epochs and same(G, after[1 if early else 5]) and not same(after[1], after[-1])
    assert [val for _, val in G.losses] == made_up[:epochs] and not G.training
    again = phase(run, s, epochs=6, early=early)  # finished, though early
    assert same(again, G) and again.losses == G.losses and len(after) == epochs
    held = images(5, "held", 2)
    z = purified(run, noisy, held, 2)
    for z_held, data in asked:  # never on pairs that G learned from
        assert torch.equal(z_held, z) and torch.equal(data.x, held.x)


def test_g_learns_to_take_noise_away(run):
    s = settings(lr=0.003, batch=20, width=0.125, patience=9)
    data = common.load_images("glyphs")
    learned = common.Images(data.x[:200], data.y[:200], "pairs")
    held = common.Images(data.x[200:250], data.y[200:250], "held")
    G = phase(run, s, epochs=4, learned=learned, held=held, K=1)
    z = purified(run, noisy, held, 1)
    before = fixer.mean_loss(run, s, F.mse_loss, nn.Identity(), z, held)
    assert before == pytest.approx(0.04, rel=0.1)
    assert fixer.mean_loss(run, s, F.mse_loss, G, z, held) < 0.5 * before
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.running_mean.abs().max() > 0 for m in norms)


def test_chains_are_drawn_anew_every_few_epochs_and_phase_two_goes_on_counting(run, monkeypatch):
    seen = []

    def recorded(run, chain, data, K, draw=0):
        seen.append((data.name, chain, K, draw))
        return data.take(slice(None)).half()
    monkeypatch.setattr(fixer, "purified", recorded)
    s = settings(refresh=2, mse_epochs=4, patience=9)
    first = phase(run, s, epochs=4, early=False, K=7)
    assert [draw for name, _, _, draw in seen if name == "pairs"] == [0, 0, 1, 1]
    assert {(name, chain, K) for name, chain, K, _ in seen} == {("pairs", noisy, 7), ("held", noisy, 7)}
    assert {draw for name, _, _, draw in seen if name == "held"} == {0}
    seen.clear()
    train_phase(run, s, "h", noisy, images(8), images(5, "held", 2), F.l1_loss, 3, 7, start=first)
    assert [draw for name, _, _, draw in seen if name == "pairs"] == [2, 2, 3]


def test_the_second_phase_starts_from_the_first(run):
    first = phase(run, early=False)
    second = train_phase(run, settings(lr=0.0), "h", noisy, images(8), images(5, "held", 2), F.mse_loss, 1, 2,
                         start=first)
    for mine, its in zip(second.parameters(), first.parameters()):
        assert torch.equal(mine, its)
    fresh = train_phase(run, settings(lr=0.0), "i", noisy, images(8), images(5, "held", 2), F.mse_loss, 1, 2)
    assert fresh.body[-1].weight.abs().max() == 0  # the identity
    assert first.body[-1].weight.abs().max() > 0


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    s = settings(lr=0.003, refresh=2, patience=9)
    whole = phase(FakeRun(tmp_path / "whole", smoke=True), s, epochs=5)
    step, calls = torch.optim.Adam.step, []

    def dying(self, *a):
        calls.append(1)
        if len(calls) == 8:  # the middle of epoch 4
            raise Killed
        return step(self, *a)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    with pytest.raises(Killed):
        phase(FakeRun(tmp_path / "broken", smoke=True), s, epochs=5)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    torch.manual_seed(99)
    broken = phase(FakeRun(tmp_path / "broken", smoke=True), s, epochs=5)
    assert same(whole, broken) and whole.losses == broken.losses


def test_a_fixer_made_otherwise_is_refused(run):
    f = common.make_net("small_cnn", 10, (1, 8, 8), 0.25).eval().requires_grad_(False)
    other = copy.deepcopy(f)
    with torch.no_grad():
        other.body[0].weight += 0.1
    perceptual, of_other = (fixer.make_perceptual(None, net, "cpu") for net in (f, other))
    G = phase(run, loss=perceptual, early=False)
    assert same(phase(run, loss=perceptual, early=False), G)
    for change in ({"loss": of_other}, {"loss": F.mse_loss}, {"epochs": 3}, {"early": True}, {"K": 3},
                   {"chain": shifted}, {"learned": images(8, seed=5)}, {"held": images(5, "held", 5)},
                   {"start": fixer.Fixer(1, 3)}, {"s": settings(lr=0.02)}, {"s": settings(lr=0.01, refresh=3)}):
        with pytest.raises(UserError, match="g.pt was made with"):
            phase(run, **{"loss": perceptual, "early": False, **change})


# --- what defends, and what attacks see of G ---


def test_one_attack_s_gradient_passes_through_g_and_the_other_does_not(exact):
    f, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
    a = torch.linspace(-2, 3, 16).view(4, 4)
    G = Blend(a, 0.5).requires_grad_(False)
    z = (a * (x + 0.25) + 0.5).requires_grad_(True)  # G(P(x))
    slope, = torch.autograd.grad(F.cross_entropy(f(z), y, reduction="sum"), z)
    logits, through = Defence(behind(G, f), 3, shifted).gradient(x, y, 1)
    assert torch.allclose(logits, f(z), atol=1e-5) and torch.allclose(through, a * slope, atol=1e-5)
    logits, around = Defence(f, 3, partial(chain_and_fixer, chain=shifted, G=G)).gradient(x, y, 1)
    assert torch.allclose(logits, f(z), atol=1e-5) and torch.allclose(around, slope, atol=1e-5)


def test_g_is_in_eval_mode_wherever_it_defends():
    G, f = fixer.Fixer(1, 4), common.make_net("small_cnn", 10, (1, 28, 28), 0.25)
    assert not any(m.training for m in behind(G, f).modules())
    x = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        G.body[-1].weight += 0.1
    ends = chain_and_fixer(x, 1, shifted, G)
    assert not any(m.training for m in G.modules()) and not ends.requires_grad
    assert torch.allclose(ends[:1], chain_and_fixer(x[:1], 1, shifted, G), atol=1e-2)  # not what else is in the batch


def test_the_same_chains_meet_every_network(run):
    """And not the same chain again: the draws of a batch differ."""
    x = torch.rand(4, 1, 8, 8)
    flat = Defence(nn.Flatten(), 3, noisy)
    first = fixer.same_chains(run, flat, x, 2)
    torch.manual_seed(5)
    second = fixer.same_chains(run, dataclasses.replace(flat, f=nn.Sequential(nn.Identity(), nn.Flatten())), x, 2)
    assert first.shape == (2, 4, 64) and torch.equal(first, second) and not torch.equal(first[0], first[1])


def test_chains_before_g_take_all_their_steps():
    ends = chain_and_fixer(torch.zeros(2, 1, 4, 4), 3, lambda x, steps: x + steps / 10, Blend(1.0, 0.5))
    assert torch.allclose(ends, chain_and_fixer(torch.full((2, 1, 4, 4), 0.3), 0, lambda x, steps: x, Blend(1.0, 0.5)), atol=1e-2)
    assert (ends - chain_and_fixer(torch.zeros(2, 1, 4, 4), 0, lambda x, steps: x, Blend(1.0, 0.5))).abs().min() > 0.2


def test_noise_in_place_of_chains_is_drawn_for_each_pixel():
    x = fixer.noise(torch.zeros(1, 3, 40, 40), 7, 0.5)
    assert x.std().item() == pytest.approx(0.5, rel=0.05) and (x[0, 0] - x[0, 1]).std() > 0.5


def test_comparisons_are_of_the_mean_of_eight_chains_of_the_defence(run, monkeypatch):
    net, y = nn.Identity(), torch.zeros(5).long()
    fake_attack(monkeypatch, lambda defence, a: ([1] * 5, [1] * 5))

    def same_chains(run, defence, x, H):
        assert (defence.f, defence.K, H) == (net, 3, 8)
        return torch.tensor([[0.0, 1.5]] + 7 * [[1.0, 0.0]])[:, None].expand(8, 5, 2)  # one chain is loud, and wrong
    monkeypatch.setattr(fixer, "same_chains", same_chains)
    few = torch.rand(5, 1, 2, 2), y
    rows = rows_of(fixer.compared(run, settings(), Defence(None, 3, noisy), {"net": net}, few, few[0], y, ATTACK))
    assert rows["natural acc, net"] == 1


# --- tables and figures ---


def fake_attack(monkeypatch, judge):
    """Replace eot_attack; what it was asked. judge(defence, a) -> (natural, robust) lists of 0 and 1."""
    asked = []

    def attack(run, defence, x, y, a):
        asked.append(SimpleNamespace(defence=defence, x=x, y=y, a=a))
        natural, robust = (torch.tensor(part).bool() for part in judge(defence, a))
        moved = 0.5 * natural.view(-1, *[1] * (x.dim() - 1))  # what is misread anyway comes back as it was
        return Outcome(natural, natural & robust, torch.stack([natural, robust]), x + moved, a)
    monkeypatch.setattr(fixer, "eot_attack", attack)
    return asked


def defences(f=None):
    """f, G, and the three defences as main makes them."""
    f = f or nn.Sequential(nn.Flatten(), nn.Linear(4, 10))
    G = Blend(0.5)
    midrun = Defence(f, 3, noisy, "path")
    through = dataclasses.replace(midrun, f=behind(G, f))
    around = dataclasses.replace(midrun, chain=partial(chain_and_fixer, chain=noisy, G=G), path=None)
    return f, G, midrun, through, around


def test_table_5_1_joins_all_attacks_on_the_same_images(run, monkeypatch):
    """Six images; the last is wrong unattacked, each attack breaks another one, PGD images of f and of f behind G too."""
    f, G, midrun, through, around = defences()
    s = settings(n=20, h_def=24)
    x, y = torch.rand(6, 1, 2, 2), torch.arange(6)
    natural = [1, 1, 1, 1, 1, 0]
    broken = [(midrun, False, 0), (midrun, True, 1), (through, False, 0), (around, False, 1), (through, True, 2)]

    def judge(defence, a):
        for other, whole, image in broken:
            if (other.f, other.chain, whole) == (defence.f, defence.chain, a.whole):
                return natural, [int(i != image) for i in range(6)]
        return natural, [0] * 6  # without chains all are broken
    asked = fake_attack(monkeypatch, judge)
    transferred, predicted = [], []

    def pgd(net, x_, y_, steps, ball):
        transferred.append((net, steps, ball))
        assert torch.equal(x_, x) and torch.equal(y_, y)
        return x + len(transferred)

    def predict(self, images, H):
        """PGD images of f break image 3, those of f behind G image 4, for both defences; image 5 is right now."""
        which = 3 if torch.equal(images, x + 1) else 4
        assert torch.equal(images, x + (which - 2))
        predicted.append((self, H))
        return torch.where(torch.arange(6) == which, -1, y)
    monkeypatch.setattr(fixer, "pgd", pgd)
    monkeypatch.setattr(Defence, "predict", predict)
    found = fixer.table_5_1(run, s, f, midrun, through, around, x, y, ATTACK)
    rows = rows_of(found)
    assert [(net, steps, ball) for net, steps, ball in transferred] == [(f, 20, BALL), (through.f, 20, BALL)]
    assert len(predicted) == 4 and all(H == 24 for _, H in predicted)
    assert all(d is one for (d, _), one in zip(predicted, (midrun, midrun, through, through)))
    for title, worst in (("mid-run", 1), ("Fixer", 0)):
        assert rows[f"natural acc, {title}"] == pytest.approx(5 / 6)
        assert rows[f"robust acc, {title}, worst of these"] == pytest.approx(worst / 6)
        for name in ("PGD images of f", "PGD images of f behind G", "whole chain"):
            assert rows[f"robust acc, {title}, {name}"] == pytest.approx(4 / 6)
    for name in ("mid-run, BPDA+EOT", "Fixer, BPDA+EOT through G", "Fixer, BPDA+EOT around G, P"):
        assert rows[f"robust acc, {name}"] == pytest.approx(4 / 6)
    for name in ("f", "f behind G"):
        assert rows[f"natural acc, {name}, no chains"] == pytest.approx(5 / 6)
        assert rows[f"robust acc, {name}, no chains"] == 0
    nets = [call.defence.f for call in asked if call.defence.K == 0]
    assert nets == [f, through.f] and len(asked) == 7
    for call in asked:
        assert torch.equal(call.x, x) and torch.equal(call.y, y)
        if call.defence.K == 0:
            assert call.a == ATTACK
        else:
            assert call.a == (ATTACK if not call.a.whole else ATTACK._replace(whole=True))
    by_chain = [call.defence for call in asked if call.a.whole]
    assert by_chain[0] is midrun and by_chain[1] is through
    assert {row["n"] for row in found} == {6} and {row["eps"] for row in found if "robust" in row["quantity"]} == {s.eps}


def test_table_5_1_without_a_mistake_of_any_attack_is_no_copy(run, monkeypatch):
    """Around G and through G are told apart, and each row shows its own attack."""
    f, G, midrun, through, around = defences()

    def judge(defence, a):
        if not defence.K:
            return [1] * 4, [0] * 4
        shown = 1 if a.whole else 3 if defence.chain is not noisy else 2
        return [1] * 4, [1] * shown + [0] * (4 - shown)
    fake_attack(monkeypatch, judge)
    monkeypatch.setattr(fixer, "pgd", lambda *a: torch.zeros(4))
    monkeypatch.setattr(Defence, "predict", lambda self, x, H: torch.zeros(4).long())
    rows = rows_of(fixer.table_5_1(run, settings(), f, midrun, through, around, torch.zeros(4), torch.zeros(4), ATTACK))
    assert rows["robust acc, Fixer, BPDA+EOT through G"] == 0.5 and rows["robust acc, Fixer, BPDA+EOT around G, P"] == 0.75
    assert rows["robust acc, Fixer, whole chain"] == rows["robust acc, mid-run, worst of these"] == 0.25
    assert rows["robust acc, Fixer, PGD images of f"] == 1


def test_figure_5_2_compares_fixed_with_purified_images(run):
    held = images(4, "held")
    chain = partial(shifted, by=0.5)
    first, G = Blend(1.0, -0.25), Blend(1.0, -0.4)
    first.losses, G.losses = [[3.0, 2.0], [1.0, 4.0]], [[5.0, 6.0]]
    midrun = Defence(None, 3, chain)
    perceptual = partial(fixer.perceptual_loss, layers=torch.square, mean=0.5, std=0.5)
    x = held.take(slice(None))
    expected = perceptual(x + 0.1, x) / perceptual(x + 0.5, x)
    rows = rows_of(fixer.figure_5_2(run, settings(k=3), midrun, held, perceptual, first, G))
    assert rows["mse loss, fixed / purified"] == pytest.approx(0.25, rel=0.02)
    assert rows["perceptual loss, fixed / purified"] == pytest.approx(expected.item(), rel=0.05)
    assert not 0.03 < expected < 0.05  # as the pixels' loss would have it
    shown = [(row["quantity"], row["epoch"], row["value"]) for row in run.shown["figure5.2-mse"]]
    assert shown == [("training", 1, 3.0), ("validation", 1, 2.0), ("training", 2, 1.0), ("validation", 2, 4.0)]
    assert [row["value"] for row in run.shown["figure5.2-perceptual"]] == [5.0, 6.0]
    assert (run.folder / "held-3-0.pt").exists()


def test_figure_5_3_shows_attacked_purified_fixed(run, monkeypatch):
    """Attacked: + .5, purified: + .25 more, fixed: half of that. f tells large images from small ones."""
    x, y = torch.full((10, 1, 2, 2), 0.5), torch.tensor([0] * 4 + [1] * 6)

    class Size(nn.Module):
        def forward(self, x):
            mean = x.mean((1, 2, 3))
            return torch.stack([torch.full_like(mean, 0.8), mean], 1)  # 1 where the mean is above .8
    f = Size()
    G = Blend(0.5)
    through = Defence(behind(G, f), 3, shifted)
    asked = fake_attack(monkeypatch, lambda defence, a: ([1] * 10, [1] * 10))
    found = fixer.figure_5_3(run, settings(k=3), f, G, through, x, y, ATTACK)
    rows = rows_of(found)
    assert len(asked) == 1 and asked[0].defence is through and asked[0].a == ATTACK and torch.equal(asked[0].x, x)
    for title, distance, right in (("attacked", 0.5, 0.6), ("purified", 0.75, 0.6), ("fixed", 0.125, 0.4)):
        assert rows[f"root mean square of {title} - natural"] == pytest.approx(distance, abs=1e-3)
        assert rows[f"acc of f, {title}"] == pytest.approx(right)
    fake_attack(monkeypatch, lambda defence, a: ([1] * 5 + [0] * 5, [1] * 10))  # half were misread before
    half = rows_of(fixer.figure_5_3(FakeRun(run.folder), settings(k=3), f, G, through, x, y, ATTACK))
    assert half["acc of f, attacked"] == pytest.approx(0.2)  # one of five is of class 1
    assert half["root mean square of attacked - natural"] == pytest.approx(0.5)  # of those alone that were attacked
    shown = run.shown["figure5.3"]
    assert list(shown) == ["natural", "attacked", "purified", "fixed"] and len(shown["fixed"]) == 8
    for title, value in (("natural", 0.5), ("attacked", 1.0), ("purified", 1.25), ("fixed", 0.625)):
        assert torch.allclose(shown[title], torch.tensor(value), atol=1e-2)


def test_figure_5_3_runs_all_steps_and_takes_root_mean_squares(run, monkeypatch):
    pattern = torch.tensor([0.0, 0.0, 1.0, 3.0]).view(1, 1, 2, 2)
    through = Defence(Blend(0.5), 3, lambda x, steps: x + steps * pattern / 3)
    fake_attack(monkeypatch, lambda defence, a: ([1] * 4, [1] * 4))  # adds .5
    monkeypatch.setattr(fixer, "outputs", lambda net, x: torch.zeros(4, 2) if net == "f" else x)
    rows = rows_of(fixer.figure_5_3(run, settings(k=3), "f", "G", through, torch.zeros(4, 1, 2, 2), torch.zeros(4), ATTACK))
    expected = (pattern + 0.5).square().mean().sqrt().item()
    assert rows["root mean square of purified - natural"] == pytest.approx(expected)


def test_stronger_attacks_are_those_they_are_called(run, monkeypatch):
    f, G, midrun, through, around = defences()
    few = torch.rand(5, 1, 2, 2), torch.arange(5)
    order = []

    def judge(defence, a):
        """mid-run: each way breaks image 0; Fixer: through G the second way breaks image 1, around the third image 2."""
        kind = "mid-run" if defence is midrun else "through" if defence is through else "around"
        order.append(kind)
        way = (a.restarts, a.N, a.ball.step)
        robust = [1] * 5
        if kind == "mid-run":
            robust[0] = 0
        if kind == "through" and way == (1, 80, 0.025):
            robust[1] = 0
        if kind == "through" and a.whole:
            robust[3] = 0
        if kind == "around" and way == (1, 40, 0.00625):
            robust[2] = 0
        return [1] * 5, robust
    asked = fake_attack(monkeypatch, judge)
    s = settings(n=20, eps=0.1, step=0.025)
    found = fixer.stronger(run, s, midrun, through, around, few, ATTACK)
    rows = rows_of(found)
    ways = {(call.a.restarts, call.a.N, call.a.ball.step) for call in asked}
    assert ways == {(3, 20, 0.025), (1, 80, 0.025), (1, 40, 0.00625)} and len(asked) == 11
    assert {call.a.ball.eps for call in asked} == {0.1} and sorted(order) == ["around"] * 3 + ["mid-run"] * 4 + ["through"] * 4
    assert all(call.x is few[0] and call.y is few[1] for call in asked)
    names = ("restarts", "more steps", "small steps", "whole chain, small steps", "worst of these")
    assert [rows[f"robust acc, mid-run, {way}"] for way in names] == [0.8] * 5
    assert [rows[f"robust acc, Fixer, {way}"] for way in names] == pytest.approx([1, 0.8, 0.8, 0.8, 0.4])
    whole = [call.a for call in asked if call.a.whole]
    assert whole == [ATTACK._replace(N=40, ball=LInf(0.1, 0.00625), whole=True)] * 2
    assert {row["quantity"].split(", ")[-1]: row["N"] for row in found if "N" in row} == {
        "restarts": 20, "more steps": 80, "small steps": 40}


def test_the_share_of_the_gap_that_is_closed(run, monkeypatch):
    """Ten images, f reads nine; one chain: 5 purified, 8 fixed, one of them spoiled."""
    x, y = torch.rand(10, 1, 2, 2), torch.arange(10)
    f, G, midrun, through, around = defences()
    read = {"f": y.clone(), "before": y.clone(), "after": y.clone()}
    read["f"][9] = 0
    read["before"][5:] = 0
    read["after"][4] = read["after"][9] = 0

    def same_chains(run, defence, x_, H):
        assert H == 1 and torch.equal(x_, x) and defence in (midrun, through)
        return F.one_hot(read["before" if defence is midrun else "after"], 10)[None].float()

    def outputs(net, x_):
        assert net is f and torch.equal(x_, x)
        return F.one_hot(read["f"], 10)
    monkeypatch.setattr(fixer, "same_chains", same_chains)
    monkeypatch.setattr(fixer, "outputs", outputs)
    rows = rows_of(fixer.upperbound(run, f, midrun, through, x, y))
    assert rows["natural acc, f(x)"] == pytest.approx(0.9) and rows["natural acc, f(P(x))"] == 0.5
    assert rows["natural acc, f(G(P(x)))"] == pytest.approx(0.8)
    assert (rows["repaired by G"], rows["spoiled by G"]) == (pytest.approx(0.4), pytest.approx(0.1))
    assert rows["share of the gap closed"] == pytest.approx(3 / 4)
    read["before"] = read["f"]
    assert "share of the gap closed" not in rows_of(fixer.upperbound(run, f, midrun, through, x, y))


def test_networks_are_compared_behind_the_same_chains(run, monkeypatch):
    """The net of each title is what is judged, on many images unattacked, on few under attack."""
    y_many = torch.arange(10) % 2

    class Says(nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.classes = classes

        def forward(self, x):
            return F.one_hot(self.classes.repeat(len(x) // 10), 2).float()
    wrong = y_many.clone()
    wrong[:3] = 1 - wrong[:3]
    nets = {"right": Says(y_many), "wrong thrice": Says(wrong)}
    few = torch.rand(4, 1, 2, 2), torch.zeros(4).long()
    asked = fake_attack(monkeypatch, lambda defence, a: ([1] * 4, [1, defence.f is nets["right"], 0, 1]))
    midrun = Defence(None, 3, noisy)
    rows = rows_of(fixer.compared(run, settings(), midrun, nets, few, torch.rand(10, 1, 2, 2), y_many, ATTACK))
    assert rows == {"natural acc, right": 1, "robust acc, right": 0.75, "natural acc, wrong thrice": pytest.approx(0.7),
                    "robust acc, wrong thrice": 0.5}
    assert all(call.x is few[0] and call.y is few[1] and call.a == ATTACK for call in asked)
    assert all((call.defence.chain, call.defence.K) == (noisy, 3) for call in asked)


def compare(monkeypatch):
    """Replace compared(); the networks and defences it was given."""
    given = []

    def compared(run, s, defence, networks, few, x_many, y_many, attack):
        given.append((defence, networks, few, x_many, y_many, attack))
        return [{"quantity": title, "value": 0} for title in networks]
    monkeypatch.setattr(fixer, "compared", compared)
    return given


def test_the_ablation_changes_what_it_says(run, monkeypatch):
    given, learned = compare(monkeypatch), {}
    f, first, G = Blend(1.0), Blend(2.0), Blend(3.0)

    def perceptual(x, target):
        return None

    def learn(name, **how):
        learned[name] = how
        how["net"] = Blend(float(len(learned)))
        return how["net"]
    s = settings(k=50, mse_epochs=20, perceptual_epochs=60)
    midrun, few, many = Defence(f, 50, noisy), (1, 2), (3, 4)
    fixer.ablation(run, s, learn, perceptual, first, G, f, midrun, few, *many, ATTACK)
    nets = {name: how.pop("net") for name, how in learned.items()}
    assert learned == {
        "mse-other": {"loss": F.mse_loss, "epochs": 20, "early": False, "K": 10},
        "mse-alone": {"loss": F.mse_loss, "epochs": 80},
        "perceptual-alone": {"loss": perceptual, "epochs": 80},
        "fixer-other": {"loss": perceptual, "epochs": 60, "K": 10, "start": nets["mse-other"]}}
    (defence, networks, *rest), = given
    assert defence is midrun and rest == [few, *many, ATTACK]
    expected = {"first phase": first, "Fixer": G, "MSE alone": nets["mse-alone"], "perceptual alone": nets["perceptual-alone"],
                "pairs of another K": nets["fixer-other"]}
    for title, net in expected.items():
        assert networks[title][0] is net and networks[title][1] is f and not networks[title].training
    assert isinstance(networks["no Fixer"][0], nn.Identity) and networks["no Fixer"][1] is f and len(networks) == 6


@pytest.mark.parametrize("path", [None, "path"])
def test_networks_are_compared_under_the_whole_chain_where_there_is_one(run, monkeypatch, path):
    asked = fake_attack(monkeypatch, lambda defence, a: ([1] * 2, [1, 0]))
    monkeypatch.setattr(fixer, "same_chains", lambda run, defence, x, H: torch.zeros(1, 2, 3))
    few = torch.rand(2, 1, 2, 2), torch.zeros(2).long()
    fixer.compared(run, settings(), Defence(None, 3, noisy, path), {"net": "net"}, few, *few, ATTACK)
    assert [call.a for call in asked] == [ATTACK._replace(whole=path is not None)]


def test_honesty_asks_a_classifier_that_g_never_saw_and_noise(run, monkeypatch):
    given = compare(monkeypatch)

    class Says(nn.Module):
        def __init__(self, says):
            super().__init__()
            self.says = says

        def forward(self, x):
            return F.one_hot(torch.full((len(x),), self.says), 2).float()
    f, other, robust, G = Says(0), Says(1), Says(1), Blend(3.0)
    midrun = Defence(f, 2, partial(noisy, size=0.1), "path", "back", chunk=7)
    few, x_many, y_many = (1, 2), torch.rand(400, 1, 4, 4), torch.tensor([1] * 300 + [0] * 100)
    rows = rows_of(fixer.honesty(run, settings(k=2), f, other, robust, G, midrun, few, x_many, y_many, ATTACK))
    assert rows["natural acc, unseen, no chains"] == 0.75  # of `other`, not of f
    (chains, plain, *rest), (noise, under_noise, *same) = given
    assert chains is midrun and rest[0] is few and rest[1] is x_many and rest[2] is y_many and rest[3] == ATTACK
    assert same[0] is few and same[1] is x_many and same[3] == ATTACK
    assert list(under_noise) == [f"{title}, noise for P" for title in plain]
    for networks in (plain, {title.removesuffix(", noise for P"): net for title, net in under_noise.items()}):
        assert networks["f, no Fixer"] is f and networks["unseen, no Fixer"] is other
        assert networks["f trained with noise"] is robust and len(networks) == 5
        for reader, net in (("f", f), ("unseen", other)):
            assert networks[f"{reader}, Fixer"][0] is G and networks[f"{reader}, Fixer"][1] is net
    moved = noise.chain(x_many, 2) - x_many  # the size of P(x) - x: two steps of .1, as the fake chain goes
    assert noise.path is None  # BPDA is exact, and there is no chain to go back through
    assert (noise.K, noise.chunk) == (2, 7) and moved.std().item() == pytest.approx(0.2, rel=0.05)
    assert abs(moved.mean().item()) < 0.02 and noise.chain.func is fixer.noise


def test_cooler_chains_have_as_much_noise_in_all(run, monkeypatch):
    given = compare(monkeypatch)
    f, V = nn.Linear(1, 1), common.make_net("light_ebm", 1, (1, 28, 28), 1 / 16).requires_grad_(False)
    its = {"V": V, "tau": 0.06, "T": 1e-4}
    midrun = Defence(f, 5, partial(fixer.langevin, **its), partial(fixer.langevin_path, **its), partial(fixer.pull_back, **its), 7)
    rows = fixer.cooler(run, settings(k=5, tau=0.06), f, midrun, (1, 2), 3, 4, ATTACK)
    (defence, networks, *rest), = given
    assert list(networks.values()) == [f] and rest == [(1, 2), 3, 4, ATTACK] and len(rows) == 1
    assert defence.K == 20 and defence.f is f and defence.chunk == 7
    for name in ("chain", "path", "back"):
        theirs, before = getattr(defence, name), getattr(midrun, name)
        assert theirs.keywords == {**its, "tau": 0.03} and theirs.func is before.func and before.keywords["tau"] == 0.06
    assert defence.K * theirs.keywords["tau"] ** 2 == pytest.approx(midrun.K * 0.06 ** 2)


# --- the energy of the other script ---


def energy_file(out, dataset="glyphs", shape=(1, 28, 28), smoke=True, finished=True, **made):
    """An untrained energy as lifecycle_midrun.py keeps it."""
    torch.manual_seed(5)
    net, width = "light_ebm", 1 / 16
    V = common.make_net(net, 1, shape, width)
    folder = out / f"lifecycle_midrun-{dataset}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy.pt").unlink(missing_ok=True)
    run = SimpleNamespace(folder=folder, device=torch.device("cpu"), seed=0, smoke=smoke)
    made = {"net": net, "width": width, "updates": 2, "temperature": 1e-4, "tau_train": 0.015, "images": TOY, **made}
    training = Training(run, "energy", made, V=V)
    saves, Training.SAVE_SECONDS = Training.SAVE_SECONDS, -1
    for it in training.updates(2):
        training.log(d=0.0)
        if it == 2 and not finished:
            break
    Training.SAVE_SECONDS = saves
    return folder / "energy.pt"


def ran(monkeypatch, code=0, makes=None):
    """Replace subprocess.run; what it was asked to run."""
    asked = []

    def run(command):
        asked.append([str(part) for part in command])
        if makes:
            makes()
        return SimpleNamespace(returncode=code)
    monkeypatch.setattr(fixer.subprocess, "run", run)
    return asked


TOY = common.Images(torch.arange(2 * 28 * 28, dtype=torch.uint8).view(2, 1, 28, 28), torch.tensor([0, 1]), "toy")


def energy_of(tmp_path, *flags, data=TOY):
    args = fixer.get_args(["--out", tmp_path / "runs", "--device", "cpu", *flags])
    return fixer.midrun_energy(args, data)


def test_an_energy_of_other_images_is_refused(tmp_path, monkeypatch):
    """Four classes of CIFAR-10 on a CPU, then all ten with the same --out: shapes agree, images do not."""
    energy_file(tmp_path / "runs")
    asked = ran(monkeypatch)
    with pytest.raises(common.UserError, match="other images"):
        energy_of(tmp_path, "--budget", "smoke", data=common.Images(TOY.x, TOY.y + 1, "toy"))
    pictures = SimpleNamespace(shape=(1, 28, 28))  # in files: lifecycle_midrun.py may have read them into memory
    energy_of(tmp_path, "--budget", "smoke", data=pictures)
    assert not asked


def test_the_energy_is_read_with_its_temperature(tmp_path, monkeypatch):
    file, asked = energy_file(tmp_path / "runs", temperature=3e-4), ran(monkeypatch)
    V, made_from = energy_of(tmp_path, "--budget", "smoke")
    assert not asked and made_from["temperature"] == 3e-4 and not any(p.requires_grad for p in V.parameters())
    state = torch.load(file, weights_only=True)["V"]
    assert all(torch.equal(v, state[k]) for k, v in V.state_dict().items())


def test_a_missing_energy_is_made_by_a_command(tmp_path, monkeypatch, capsys):
    asked = ran(monkeypatch, makes=lambda: energy_file(tmp_path / "runs"))
    flags = ("--budget", "smoke", "--seed", 7, "--data-dir", "elsewhere", "--first-class", 3)
    energy_of(tmp_path, *flags)
    assert "lifecycle_midrun.py --only figure3.2" in capsys.readouterr().out
    (python, script, *rest), = asked
    assert python == fixer.sys.executable and script.endswith("lifecycle_midrun.py") and rest[:2] == ["--only", "figure3.2"]
    told = dict(zip(rest[2::2], rest[3::2]))
    assert told == {"--dataset": "glyphs", "--budget": "smoke", "--out": str(tmp_path / "runs"), "--data-dir": "elsewhere",
                    "--seed": "7", "--device": "cpu", "--first-class": "3"}
    energy_of(tmp_path, *flags)  # it is there now
    assert len(asked) == 1


def test_the_command_is_one_that_the_other_script_knows(tmp_path):
    import lifecycle_midrun
    assert "figure3.2" in lifecycle_midrun.EXPERIMENTS
    for dataset, budget in fixer.SETTINGS:
        assert lifecycle_midrun.get_args(["--dataset", dataset, "--budget", budget, "--only", "figure3.2", "--device", "cpu"])


@pytest.mark.parametrize("how", [{"finished": False, "smoke": False}, {"smoke": True}])
def test_an_unfinished_energy_or_one_of_a_smoke_run_does_not_do(tmp_path, monkeypatch, how):
    energy_file(tmp_path / "runs", **how)
    asked = ran(monkeypatch, makes=lambda: energy_file(tmp_path / "runs", smoke=False))
    energy_of(tmp_path)
    assert len(asked) == 1
    energy_of(tmp_path)
    energy_of(tmp_path, "--budget", "smoke")  # a smoke run takes a real one too
    assert len(asked) == 1


def test_a_failed_command_is_one_line(tmp_path, outcome, monkeypatch):
    ran(monkeypatch, code=2)
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    assert code == 2 and "lifecycle_midrun.py" in err and err.count("\n") == 1
    ran(monkeypatch)  # says it went well, and made nothing
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    assert code == 2 and "energy.pt" in err and err.count("\n") == 1


def test_energies_that_cannot_be_used(tmp_path, outcome, monkeypatch):
    asked = ran(monkeypatch)
    torn = tmp_path / "torn" / "lifecycle_midrun-glyphs" / "energy.pt"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"torn")
    foreign = energy_file(tmp_path / "foreign")  # a checkpoint, but of something else
    torch.save({"weights": torch.zeros(3)}, foreign)
    energy_file(tmp_path / "shape")
    torch.save(torch.load(energy_file(tmp_path / "large", "cifar10", (3, 32, 32)), weights_only=True),
               tmp_path / "shape" / "lifecycle_midrun-glyphs" / "energy.pt")
    energy_file(tmp_path / "net", net="nothing")
    for name in ("torn", "foreign", "shape", "net"):
        code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path / name, "--device", "cpu")
        assert code == 2 and "energy.pt" in err and err.count("\n") == 1
        assert not (tmp_path / name / "fixer-glyphs").exists()
    assert not asked


def test_a_fixer_of_another_energy_is_refused(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", "figure5.2")
    file = energy_file(tmp_path, images=common.load_images("glyphs"))
    assert outcome(fixer, *flags) == (0, "")
    state = torch.load(file, weights_only=True)
    state["V"]["body.0.weight"] += 0.1
    torch.save(state, file)
    code, err = outcome(fixer, *flags)
    assert code == 2 and "made with" in err and err.count("\n") == 1
    assert outcome(fixer, *flags, "--fresh") == (0, "") and file.exists()


# --- main: who gets what ---


@pytest.fixture
def wired(tmp_path, monkeypatch):
    """Run main up to its experiments; what they are given, made when asked for, and what was trained."""
    def wire(*flags, dataset="glyphs", shape=(1, 28, 28), **made):
        made.setdefault("images", common.load_images("glyphs"))
        energy_file(tmp_path, dataset, shape, **made)
        have, trained = {}, {}

        def experiments(self, registry, **given):
            have.update(given)

        def train_classifier(run, name, build, **how):
            trained[name] = {"net": build().eval(), **how}
            return trained[name]["net"]

        def train_phase(run, s, name, **how):
            trained[name] = {"net": fixer.Fixer(shape[0], 3).eval(), **how}
            return trained[name]["net"]
        monkeypatch.setattr(common.Run, "experiments", experiments)
        monkeypatch.setattr(common, "train_classifier", train_classifier)
        monkeypatch.setattr(fixer, "train_phase", train_phase)
        fixer.main([str(flag) for flag in ("--budget", "smoke", "--dataset", dataset, "--out", tmp_path, "--device", "cpu",
                                           *flags)])
        made_things = {}
        for name, thing in have.items():
            made_things[name] = thing() if isinstance(thing, common.once) else thing
        return SimpleNamespace(**made_things), trained
    return wire


def test_the_defences_are_made_of_the_energy_g_and_f(wired):
    have, trained = wired("--tau", 0.02, "--k", 4, "--chunk", 9, temperature=3e-4)
    chain, path, back = have.midrun.chain, have.midrun.path, have.midrun.back
    assert chain.func is fixer.langevin and chain.keywords["tau"] == 0.02 and chain.keywords["T"] == 3e-4
    assert path.func is fixer.langevin_path and back.func is fixer.pull_back
    assert path.keywords == back.keywords == chain.keywords
    assert (have.midrun.K, have.midrun.chunk, have.midrun.f) == (4, 9, have.f) and have.f is trained["f"]["net"]
    G = trained["fixer"]["net"]
    assert have.G is G and [*have.through.f] == [G, have.f]
    assert (have.through.chain, have.through.path, have.through.back, have.through.K) == (chain, path, back, 4)
    assert have.around.f is have.f and have.around.K == 4 and have.around.chain.func is chain_and_fixer
    assert have.around.chain.keywords == {"chain": chain, "G": G} and have.around.path is None
    assert have.other is trained["other"]["net"] and have.other is not have.f
    assert isinstance(have.other, common.ResNet) and isinstance(have.f, common.SmallCNN)


def test_a_classifier_is_trained_with_noise(wired):
    have, trained = wired("--f-noise", 0.3, "--f-sgd", 0.2, "--f-iters", 7)
    how = trained["f-noisy"]
    assert have.noisy is how["net"] and isinstance(have.noisy, common.SmallCNN) and have.noisy is not have.f
    assert (how["noise"], how["sgd"], how["iterations"]) == (0.3, 0.2, 7) and how["data"] is trained["f"]["data"]


def test_the_first_classes_can_be_left_out(wired):
    four = common.load_images("glyphs").from_class(6)
    have, trained = wired("--first-class", 6, "--natural", 60, "--pairs", 50, images=four)
    assert have.f.head.out_features == have.other.head.out_features == 4
    assert sorted(set(have.y_many.tolist())) == sorted(set(trained["f"]["data"].y.tolist())) == [0, 1, 2, 3]
    assert set(have.held.y.tolist()) <= {0, 1, 2, 3} and set(trained["mse"]["learned"].y.tolist()) == {0, 1, 2, 3}


def test_the_loss_network_is_vgg_where_its_weights_are_at_hand(wired, monkeypatch):
    monkeypatch.setattr(common, "weights_at_hand", lambda name, folder: name)
    monkeypatch.setattr(fixer, "make_perceptual", lambda *given: given)
    have, _ = wired("--f-width", 2)
    assert have.perceptual == ("vgg16-397923af.pth", have.f, torch.device("cpu"))
    assert have.f.head.in_features == 128  # --f-width


def test_both_phases_are_made_from_the_defence_s_own_chains(wired):
    have, trained = wired("--k", 4, "--pairs", 50, "--held", 20, "--mse-epochs", 5, "--perceptual-epochs", 6)
    first, second = trained["mse"], trained["fixer"]
    assert first["loss"] is F.mse_loss and first["epochs"] == 5 and first["early"] is False and "start" not in first
    assert second["loss"] is have.perceptual and second["epochs"] == 6 and second["start"] is first["net"]
    assert "early" not in second and have.first is first["net"]
    assert have.perceptual.keywords["layers"][0] is have.f.body[0]
    data = common.load_images("glyphs")
    for how in (first, second):
        assert how["chain"] is have.midrun.chain and how["K"] == have.midrun.K == 4
        assert torch.equal(how["learned"].x, data.x[common.shuffled(10_000, 321)[:50]])
        assert torch.equal(how["held"].x, data.x[common.shuffled(10_000, 321)[50:70]])  # none of the pairs
        assert how["held"].name != how["learned"].name
    assert have.held is first["held"]
    assert have.learn.keywords == {"chain": have.midrun.chain, "learned": first["learned"], "held": have.held, "K": 4}


def test_f_is_the_classifier_that_other_scripts_share(wired):
    _, trained = wired("--f-iters", 7)
    f, other = trained["f"], trained["other"]
    assert f["shared"] and f["iterations"] == other["iterations"] == 7 and f["augment"] == "none" and f["sgd"] == 0
    assert "shared" not in other and "batch" not in f and "noise" not in f and "noise" not in other
    assert f["data"] is other["data"] and torch.equal(f["data"].x, common.load_images("glyphs").x)


def test_attacked_and_natural_images_are_of_the_test_split(wired):
    have, _ = wired("--natural", 30, "--images", 8, "--few", 4, "--eps", 0.3, "--step", 0.1, "--n", 5, "--h-adv", 3, "--h-def", 7)
    test = common.load_images("glyphs", "test")
    index = common.shuffled(2000, 123)[:30]
    assert torch.equal(have.x_many, test.take(index)) and torch.equal(have.y_many, test.y[index])
    assert torch.equal(have.x, have.x_many[:8]) and torch.equal(have.y, have.y_many[:8])
    assert torch.equal(have.few[0], have.x[:4]) and torch.equal(have.few[1], have.y[:4])
    assert have.attack == Attack(LInf(0.3, 0.1), 5, 3, 7)


def test_colour_images_are_cropped_and_flipped_for_f(wired, write_npz):
    folder = write_npz("cifar10")
    have, trained = wired("--data-dir", folder, dataset="cifar10", shape=(3, 32, 32),
                          images=common.load_images("cifar10", "train", folder))
    assert trained["f"]["augment"] == trained["other"]["augment"] == "crop_flip" and trained["f"]["sgd"] == 0.1
    assert isinstance(have.f, common.WideResNet)


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    energy_file(tmp_path, images=common.load_images("glyphs"))
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--f-iters", 30, "--only", *fixer.EXPERIMENTS)
    assert outcome(fixer, *flags) == (0, "")
    folder = tmp_path / "fixer-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(fixer.EXPERIMENTS)
    for name, entry in results.items():
        assert entry["energy"]["net"] == "light_ebm" and entry["loss_network"] == "f"
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
            if "acc" in row["quantity"]:
                low, high = row["interval"]
                assert 0 <= low <= row["value"] <= high <= 1
    rows = rows_of(results["table5.1"]["rows"])
    for title, count in (("mid-run", 4), ("Fixer", 5)):
        attacks = [v for k, v in rows.items() if k.startswith(f"robust acc, {title}, ") and "worst" not in k]
        assert len(attacks) == count and rows[f"robust acc, {title}, worst of these"] <= min(attacks)
        assert rows[f"natural acc, {title}"] >= max(attacks)
    for picture in ("figure5.2-mse", "figure5.2-perceptual", "figure5.3", "ablation"):
        assert picture == "ablation" or (folder / f"{picture}.png").exists()
    assert (tmp_path / "shared-glyphs").exists() and list((tmp_path / "shared-glyphs").glob("f-*.pt"))


def test_smoke_run_on_a_folder_with_pretrained_networks(tmp_path, outcome, monkeypatch):
    random = np.random.RandomState(0)
    data = tmp_path / "data"
    for split, n in (("train", 1000), ("val", 14)):
        for i in range(n):
            file = data / "imagenet" / split / f"n{i:04}" / "1.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(random.randint(0, 256, (9, 8, 3), dtype=np.uint8)).save(file)
    energy_file(tmp_path, "imagenet", (3, 224, 224))
    monkeypatch.setattr(common.torchvision.models, "get_model", lambda name, weights: TinyTorchvision())
    flags = ("--dataset", "imagenet", "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu",
             "--images", 2, "--natural", 2, "--pairs", 4, "--held", 2, "--batch", 2, "--mse-epochs", 1,
             "--perceptual-epochs", 1, "--h-def", 2, "--k", 2, "--few", 2)
    code, err = outcome(fixer, *flags)
    assert code == 2 and "vgg16-397923af.pth" in err
    vgg_file(data, monkeypatch)
    assert outcome(fixer, *flags, "--only", "table5.1", "figure5.3") == (0, "")
    results = json.loads((tmp_path / "fixer-imagenet" / "results.json").read_text())["table5.1"]
    assert results["loss_network"] == "VGG-16"
    for row in common.published("fixer", "imagenet", "table5.1"):  # beside ours in the closing table
        assert row["quantity"] in rows_of(results["rows"]) or "adversarial training" in row["quantity"]
    (data / "imagenet" / "train" / "n0999" / "1.png").unlink()
    code, err = outcome(fixer, *flags)
    assert code == 2 and "1000" in err


def test_labels_of_a_folder_are_ranks_among_all_its_folders(tmp_path):
    for i in range(12):
        file = tmp_path / "imagenet" / "train" / f"n{i:02}" / "1.png"
        file.parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), 20 * i, dtype=np.uint8)).save(file)
    data = common.load_images("imagenet", "train", tmp_path, side=8)
    some = fixer.subset("tested", data, 123, slice(2, 5))
    assert some.y.tolist() == common.shuffled(12, 123)[2:5].tolist() and some.name == "tested"
    assert (some.x.float().mean((1, 2, 3)).round() == 20 * some.y).all()


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "--eps"), (("--eps", "8"), "--eps"), (("--tau", "0"), "--tau"),
    (("--batch", "1"), "--batch"), (("--batch", "9", "--pairs", "8"), "--pairs"), (("--images", "9", "--natural", "8"), "--natural"),
    (("--patience", "0"), "--patience"), (("--mse-epochs", "0"), "--mse-epochs"), (("--few", "0"), "--few"),
    (("--f-net", "nothing"), "nothing"), (("--pairs", "10000"), "--pairs"), (("--natural", "2001"), "--natural"),
    (("--k", "0"), "--k"), (("--dataset", "flowers"), "--dataset"), (("--only", "figure9"), "figure9")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, monkeypatch, flags, says):
    asked = ran(monkeypatch)
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not asked


def test_settings_are_the_published_ones():
    s = fixer.SETTINGS["imagenet", "paper"]
    assert (s.mse_epochs, s.perceptual_epochs) == (40, 100)  # sec. 5.2.1
    assert (s.k, 2 * s.tau, s.h_def, s.h_adv, s.n, s.eps, s.step) == (200, .02, 64, 24, 50, 2 / 255, 1 / 255)
    c = fixer.SETTINGS["cifar10", "paper"]
    assert (c.k, 2 * c.tau, c.h_def, c.h_adv, c.n, c.eps, c.step) == (2000, .01, 128, 48, 50, 8 / 255, 2 / 255)


def test_the_script_runs_as_a_command(tmp_path):
    done = subprocess.run([fixer.sys.executable, fixer.__file__, "--list"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "table5.1" in done.stdout and "upperbound" in done.stdout
