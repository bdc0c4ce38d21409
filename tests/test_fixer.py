"""fixer.py: pairs and when they are refused, losses, early stopping, what attacks see of G, the script as a whole."""
import copy
import json
import math
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import fixer
from common import UserError
from fixer import Defence, Fixed, behind, fingerprint, perceptual_loss, stopped


@pytest.fixture(autouse=True)
def no_weights_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))


class Slim(nn.Module):
    """In place of torchvision's VGG-16, whose file has half a gigabyte."""

    def __init__(self, **_):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, 1, 1),
                                      nn.ReLU(), *[nn.MaxPool2d(2) for _ in range(8)])


def vgg_file(tmp_path, monkeypatch):
    monkeypatch.setattr(common.torchvision.models, "vgg16", Slim)
    (tmp_path / "data").mkdir(exist_ok=True)
    made, file = Slim(), tmp_path / "data" / common.VGGMaps.FILE
    torch.save(made.state_dict(), file)
    return made, file


def energy_file(out, dataset="glyphs", shape=(1, 28, 28), **changes):
    """An untrained energy in place of lifecycle_midrun.py's; changes: to what it says of itself."""
    torch.manual_seed(5)
    net, width = ("biggan_deep", 1 / 16) if shape[1] > 64 else ("light_ebm", 1 / 16)
    V = common.make_net(net, 1, shape, width)
    file = out / f"lifecycle_midrun-{dataset}" / "energy.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    made = {"net": net, "width": width, "temperature": 1e-4, "updates": 6, "budget": "smoke", "data": [9, *shape],
            "tau_train": 0.015}
    common.save_checkpoint(file, made | changes.pop("made", {}), V=V.state_dict(), **{"it": 6} | changes)
    return file


def lab_of(tmp_path, *flags, name="runs"):
    energy_file(tmp_path / name)
    argv = ["--budget", "smoke", "--out", str(tmp_path / name), "--device", "cpu", *map(str, flags)]
    return fixer.Lab(fixer.get_args(argv))


class Noise:
    """In place of Sampler: chains that add noise to their images, and count what they did."""

    def __init__(self, size=0.2):
        self.size, self.calls = size, []

    def __call__(self, x, steps):
        self.calls.append((len(x), steps))
        return x + self.size * torch.randn_like(x), torch.tensor(0.1)


class Killed(Exception):
    pass


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


# --- the network ---


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 64, 64)])
def test_g_is_the_identity_before_training_and_never_clamps(shape):
    G, x = common.make_net("fixer", 1, shape, 0.125), 3 * torch.randn(4, *shape)
    for mode in (True, False):
        assert torch.equal(G.train(mode)(x), x)
    F.mse_loss(G.train()(x), torch.zeros_like(x)).backward()
    assert G.body[-1].weight.grad.abs().sum() > 0                               # and yet it can learn
    with torch.no_grad():
        G.body[-1].weight += 0.1
    assert G(x).shape == x.shape and not torch.allclose(G(x), x)
    blocks = [m for m in G.modules() if isinstance(m, common.GBlock)]
    assert len(blocks) == (6 if shape[1] == 64 else 4)
    assert not any(isinstance(m, nn.Upsample) for m in G.modules())


# --- pairs ---


def test_pairs_are_made_with_the_defence_s_sampler_and_its_k(tmp_path):
    lab = lab_of(tmp_path, "--k", 3, "--tau", 0.02)
    index = lab.split[0]
    z = fixer.purified(lab, "pairs", index, lab.s.k)
    assert lab.defence(lab.f).sampler is lab.sampler and lab.defence(lab.f).K == 3
    assert lab.sampler.tau == 0.02 and lab.sampler.temperature == 1e-4
    torch.manual_seed(lab.args.seed + len(index))
    assert torch.equal(z, lab.sampler(lab.images(index), 3)[0].half())


def test_pairs_are_kept_drawn_anew_and_refused_when_made_otherwise(tmp_path):
    lab = lab_of(tmp_path)
    lab.sampler, index = Noise(), lab.split[0]
    first = fixer.purified(lab, "pairs", index, 3)
    assert lab.sampler.calls == [(8, 3)]
    torch.manual_seed(77)
    assert torch.equal(fixer.purified(lab, "pairs", index, 3), first) and len(lab.sampler.calls) == 1
    second = fixer.purified(lab, "pairs", index, 3, draw=1)
    assert len(lab.sampler.calls) == 2 and not torch.equal(first, second)
    assert torch.equal(fixer.purified(lab, "pairs", index, 3), first) and len(lab.sampler.calls) == 3
    with pytest.raises(UserError, match="made with K 3 .now 4"):
        fixer.purified(lab, "pairs", index, 4)
    for changes, says in (({"temperature": 2e-4}, "temperature"), ({"energy": "12.3"}, "energy")):
        other = copy.copy(lab)
        other.made_with = lab.made_with | changes
        with pytest.raises(UserError, match=says):
            fixer.purified(other, "pairs", index, 3)
    other = lab_of(tmp_path, "--tau", 0.01)
    with pytest.raises(UserError, match="tau 0.06 .now 0.01"):
        fixer.purified(other, "pairs", index, 3)
    assert len(lab.sampler.calls) == 3


def test_interrupted_pairs_go_on_bit_exactly(tmp_path, monkeypatch):
    flags = ("--chunk", 3)
    whole = lab_of(tmp_path, *flags, name="whole")
    expected = fixer.purified(whole, "pairs", whole.split[0], 2, draw=1)
    lab = lab_of(tmp_path, *flags, name="broken")
    times = iter(range(0, 10_000, 100))
    monkeypatch.setattr(fixer.time, "time", lambda: next(times))                # a minute after every part

    class Dying:
        def __call__(self, x, steps):
            if len(x) == 2:
                raise Killed
            return whole.sampler(x, steps)
    lab.sampler = Dying()
    with pytest.raises(Killed):
        fixer.purified(lab, "pairs", lab.split[0], 2, draw=1)
    assert torch.load(lab.run.folder / "pairs.pt", weights_only=True)["done"] == 6
    lab.sampler = whole.sampler
    torch.manual_seed(99)
    assert torch.equal(fixer.purified(lab, "pairs", lab.split[0], 2, draw=1), expected)


def test_held_out_images_are_none_of_the_pairs_and_none_is_for_test(tmp_path):
    lab = lab_of(tmp_path, "--pairs", 200, "--held", 100)
    learned, held = map(set, (part.tolist() for part in lab.split))
    assert len(learned) == 200 and len(held) == 100 and not learned & held
    assert len(lab.pictures) == 300 and torch.equal(lab.images(torch.arange(300)),
                                                    lab.data.take(common.shuffled(10_000, 321)[:300]))
    i = common.shuffled(2000, 123)[:8]
    assert torch.equal(lab.x, lab.test.take(i)) and torch.equal(lab.y, lab.test.y[i])
    lab = lab_of(tmp_path, "--natural", 20)
    assert len(lab.x) == len(lab.y) == 8 and [len(part) for part in lab.natural] == [20, 20]
    assert torch.equal(lab.natural[0][:8], lab.x)


def test_chains_and_images_stay_together_across_chunks(tmp_path):
    lab = lab_of(tmp_path, "--chunk", 3)
    lab.sampler = Noise(0.0)
    assert torch.equal(fixer.purified(lab, "pairs", lab.split[0], 3), lab.images(lab.split[0]).half())
    lab = lab_of(tmp_path, "--chunk", 7)                                        # two images, three chains each
    lab.sampler = Noise(0.0)
    found = fixer.same_chains(lab, lab.x, 3, {"pixels": lambda x: x.flatten(1)})["pixels"]
    assert all(torch.allclose(chain, lab.x.flatten(1), atol=1e-6) for chain in found)


def test_pairs_of_other_images_are_refused(tmp_path):
    lab = lab_of(tmp_path, "--pairs", 8)
    fixer.purified(lab, "pairs-held", lab.split[1], 3)
    lab = lab_of(tmp_path, "--pairs", 6)                                        # as many, but others, are held out
    with pytest.raises(UserError, match="pairs 8 .now 6"):
        fixer.purified(lab, "pairs-held", lab.split[1], 3)


def test_chains_that_run_away_end_with_advice(tmp_path):
    lab = lab_of(tmp_path)
    lab.sampler = Noise(math.inf)
    with pytest.raises(common.Diverged, match="lower --tau"):
        fixer.purified(lab, "pairs", lab.split[0], 3)


# --- losses and the two phases ---


def test_perceptual_loss_against_a_hand_count():
    """phi: sums of pairs of columns, and their negatives; C = 2, H = 1, W = 2."""
    def phi(x):
        sums = x.unflatten(3, (2, 2)).sum(4)                                    # [B, 1, 1, 2]
        return torch.cat([sums, -sums], 1)
    x = torch.tensor([[[[1., 2., 3., 4.]]], [[[0., 0., 0., 1.]]]])
    target = torch.tensor([[[[0., 2., 3., 3.]]], [[[0., 0., 0., 0.]]]])
    by_hand = [(1 + 1 + 1 + 1) / (2 * 1 * 2), (0 + 1 + 0 + 1) / (2 * 1 * 2)]
    assert perceptual_loss(phi, x, target).item() == pytest.approx(sum(by_hand) / 2)


def test_early_stopping_on_a_made_up_curve():
    losses = [9, 7, 8, 6, 6.5, 6.2, 6.1, 3]
    assert [stopped(losses[:n], 3) for n in range(1, 9)] == [False] * 6 + [True, False]
    assert [stopped(losses[:n], 1) for n in range(1, 5)] == [False, False, True, False]


@pytest.mark.parametrize("early", [True, False])
def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path, monkeypatch, early):
    """Losses before training and after epochs 1 to 5; patience 2: it ends after epoch 4, and keeps epoch 2."""
    made_up, after = [5.0, 4.0, 3.0, 3.5, 3.2, 1.0], []
    monkeypatch.setattr(fixer, "mean_loss", lambda lab, loss, G, z, held: after.append(copy.deepcopy(G))
                        or made_up[len(after) - 1])
    lab = lab_of(tmp_path, "--patience", 2, "--lr", 0.01)
    lab.sampler = Noise()
    G, curve = fixer.train_phase(lab, "g", "mse", 5, early=early)
    epochs = 4 if early else 5
    assert len(after) == epochs + 1 and same(G, after[2 if early else 5]) and not same(after[2], after[-1])
    assert curve[:, 1].tolist()[:epochs + 1] == pytest.approx(made_up[:epochs + 1])
    assert curve[epochs + 1:].isnan().all() and not G.training and not any(p.requires_grad for p in G.parameters())
    again, then = fixer.train_phase(lab, "g", "mse", 5, early=early)            # finished, though early
    assert same(again, G) and torch.equal(then[:epochs + 1, 1], curve[:epochs + 1, 1]) and len(after) == epochs + 1
    rows = (lab.run.folder / "log-g.csv").read_text().splitlines()
    assert len(rows) == epochs + 1


def test_g_learns_to_take_noise_away(tmp_path):
    lab = lab_of(tmp_path, "--pairs", 200, "--held", 50, "--batch", 20, "--width", 0.125, "--lr", 0.003)
    lab.sampler = Noise()
    G, curve = fixer.train_phase(lab, "g", "mse", 4)
    before = fixer.mean_loss(lab, F.mse_loss, None, fixer.purified(lab, "pairs-held", lab.split[1], 3), lab.split[1])
    assert before == pytest.approx(0.04, rel=0.1) and curve[0, 1].item() == pytest.approx(before, rel=1e-4)
    assert curve[-1, 1] < 0.5 * before
    norms = [m for m in G.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and all(m.running_mean.abs().max() > 0 for m in norms)         # it learned in train mode
    x = lab.x
    with torch.no_grad():
        assert (G(x + 0.2 * torch.randn_like(x)) - x).pow(2).mean() < 0.02


def test_chains_are_drawn_anew_every_few_epochs_and_phase_two_goes_on_counting(tmp_path, monkeypatch):
    seen, real = [], fixer.purified
    monkeypatch.setattr(fixer, "purified", lambda lab, name, index, K, draw=0: seen.append((name, K, draw))
                        or real(lab, name, index, K, draw))
    lab = lab_of(tmp_path, "--refresh", 2, "--mse-epochs", 4, "--perceptual-epochs", 3, "--patience", 9)
    lab.phases
    assert [draw for name, K, draw in seen if name == "pairs"] == [0, 1, 2, 3]
    assert {draw for name, K, draw in seen if name == "pairs-held"} == {0} and {K for _, K, _ in seen} == {3}
    seen.clear()
    fixer.train_phase(lab, "other", "mse", 1, K=2)
    assert {(name, K) for name, K, _ in seen} == {("pairs-other", 2), ("pairs-other-held", 2)}


def test_the_second_phase_starts_from_the_first_and_learns_the_other_loss(tmp_path, monkeypatch):
    lab = lab_of(tmp_path, "--mse-epochs", 3, "--lr", 0.003)
    kinds = []
    lab.losses = {kind: lambda x, target, kind=kind, loss=loss: kinds.append(kind) or loss(x, target)
                  for kind, loss in lab.losses.items()}
    (mse, first), (G, second) = lab.phases
    assert kinds == ["mse"] * kinds.count("mse") + ["perceptual"] * kinds.count("perceptual") and len(set(kinds)) == 2
    z = fixer.purified(lab, "pairs-held", lab.split[1], 3)
    kept = fixer.mean_loss(lab, lab.losses["perceptual"], mse, z, lab.split[1])
    assert second[0, 1].item() == pytest.approx(kept, rel=1e-3) and first[:, 1].isfinite().all()
    assert not same(mse, G) or second[1:, 1].min() >= second[0, 1]


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    flags = ("--mse-epochs", 5, "--refresh", 2, "--lr", 0.003, "--patience", 9)
    whole = fixer.train_phase(lab_of(tmp_path, *flags, name="whole"), "g", "mse", 5)
    step, calls = torch.optim.Adam.step, []

    def dying(self, *a):
        calls.append(1)
        if len(calls) == 8:                                                     # the middle of epoch 4
            raise Killed
        return step(self, *a)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    with pytest.raises(Killed):
        fixer.train_phase(lab_of(tmp_path, *flags, name="broken"), "g", "mse", 5)
    monkeypatch.undo()
    torch.manual_seed(99)
    broken = fixer.train_phase(lab_of(tmp_path, *flags, name="broken"), "g", "mse", 5)
    assert same(whole[0], broken[0]) and torch.equal(whole[1][1:], broken[1][1:])


def test_training_leaves_the_classifier_and_the_energy_alone(tmp_path):
    lab = lab_of(tmp_path)
    f, before = lab.f, [copy.deepcopy(net.state_dict()) for net in (lab.f, lab.V)]
    f.zero_grad()                                                               # what its own training left
    lab.phases
    for net, state in zip((f, lab.V), before):
        assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()) and not f.training
        assert all(p.grad is None for p in net.parameters())


def test_f_is_the_same_whether_the_fixer_or_an_attack_asks_for_it_first(tmp_path):
    """Bfloat16 copies of weights that a surrounding autocast keeps must not be what f is trained on."""
    flags = ("--f-iters", 20)
    first, second = lab_of(tmp_path, *flags, name="a"), lab_of(tmp_path, *flags, name="b")
    first.f, second.phases
    assert same(first.f, second.f) and (outputs_of(first.f, first.x) == outputs_of(second.f, first.x)).all()


def outputs_of(f, x):
    with torch.no_grad():
        return f(x)


# --- the loss network ---


def test_the_loss_network_is_a_layer_of_f_or_vgg(tmp_path, monkeypatch):
    lab = lab_of(tmp_path)
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(lab.phi(x), lab.f.body[:9](2 * x - 1), atol=1e-5)
    assert lab.loss_network == "small_cnn (f), layer body.8"
    made, file = vgg_file(tmp_path, monkeypatch)
    lab = lab_of(tmp_path, "--data-dir", tmp_path / "data", "--layer", 3)
    with torch.no_grad():
        z = (x.expand(-1, 3, -1, -1) - lab.phi.mean) / lab.phi.std
        assert torch.allclose(lab.phi(x), made.features[:4](z), atol=1e-4)
    assert lab.phi(x).shape == (3, 6, 14, 14) and lab.loss_network == "VGG-16, layer 3"
    assert not any(p.requires_grad for p in lab.phi.parameters())
    lab.phases
    other = lab_of(tmp_path, "--data-dir", tmp_path / "data", "--loss-net", "f")
    assert other.loss_network.endswith("body.8")
    with pytest.raises(UserError, match="fixer.pt was made with loss VGG-16, layer 3"):
        other.phases
    torch.save(Slim().state_dict(), file)                                       # other weights under the same name
    with pytest.raises(UserError, match="fixer.pt was made with loss VGG-16, layer 3"):
        lab_of(tmp_path, "--data-dir", tmp_path / "data", "--layer", 3).phases
    for layer in (9, 40):                                                       # nothing left to pool; no such layer
        with pytest.raises(UserError, match="no such layer"):
            lab_of(tmp_path, "--data-dir", tmp_path / "data", "--layer", layer)
    file.write_bytes(b"torn")
    with pytest.raises(UserError, match="not torchvision's VGG-16"):
        lab_of(tmp_path, "--data-dir", tmp_path / "data")


# --- what defends, and what attacks see ---


class Blend(nn.Module):
    """A Fixer of known derivative: a x + b."""

    def __init__(self, a, b=0.0):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.as_tensor(a)), b

    def forward(self, x):
        return self.a * x + self.b


def shifted(x, steps):
    return x + 0.25, torch.tensor(0.1)


def test_the_stronger_attack_s_gradient_passes_through_g_and_the_other_does_not(exact):
    f, x, y = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.rand(2, 1, 4, 4), torch.tensor([0, 2])
    a = torch.linspace(-2, 3, 16).view(4, 4)
    G = Blend(a, 0.5).requires_grad_(False)
    z = (a * (x + 0.25) + 0.5).requires_grad_(True)                             # G(T(x))
    slope, = torch.autograd.grad(F.cross_entropy(f(z), y, reduction="sum"), z)
    logits, through = Defence(behind(G, f), 3, shifted).gradient(x, y, 1)
    assert torch.allclose(logits, f(z), atol=1e-5) and torch.allclose(through, a * slope, atol=1e-5)
    logits, around = Defence(f, 3, Fixed(shifted, G)).gradient(x, y, 1)
    assert torch.allclose(logits, f(z), atol=1e-5) and torch.allclose(around, slope, atol=1e-5)


def test_both_defences_say_the_same_of_the_same_chain(tmp_path):
    lab = lab_of(tmp_path)
    G = Blend(0.7, 0.1)
    one, two = lab.defence(lab.f, G), lab.defence(lab.f, G, around=True)
    found = []
    for defence in (one, two):
        torch.manual_seed(3)
        found.append(defence.chains(lab.x, 2))
    assert torch.allclose(*found, atol=1e-3) and one.smooth is not None
    torch.manual_seed(3)
    assert not torch.allclose(lab.defence(lab.f).chains(lab.x, 2), found[0], atol=1e-3)


def test_g_is_in_eval_mode_wherever_it_defends(tmp_path):
    lab = lab_of(tmp_path, "--lr", 0.01)
    G, x = lab.fixer, lab.x
    with torch.no_grad():
        batch = G(x)
        assert torch.allclose(batch[:1], G(x[:1]), atol=1e-5)                   # not what else is in the batch
        assert not torch.allclose(copy.deepcopy(G).train()(x), batch, atol=1e-4)
    fG = behind(G, lab.f)
    before = copy.deepcopy(fG.state_dict())
    lab.transferred(fG)
    lab.attack("a", lab.defence(lab.f, G))
    lab.attack("b", lab.defence(lab.f, G, around=True))
    assert not any(m.training for m in fG.modules())
    assert all(torch.equal(v, before[k]) for k, v in fG.state_dict().items())
    assert not any(m.training for m in behind(G.train(), lab.f).modules())
    assert not any(m.training for m in lab.defence(lab.f, G.train(), around=True).sampler.G.modules())


def test_an_attack_on_other_networks_is_refused(tmp_path):
    lab = lab_of(tmp_path)
    lab.attack("a", lab.defence(lab.f, Blend(0.7)))
    lab.attack("a", lab.defence(lab.f, Blend(0.7)))
    for around in (False, True):
        with pytest.raises(UserError, match="networks"):
            lab.attack("a", lab.defence(lab.f, Blend(0.8), around=around))
    lab.attack("b", lab.defence(lab.f, Blend(0.7), around=True))
    with pytest.raises(UserError, match="networks"):
        lab.attack("b", lab.defence(lab.f, Blend(0.8), around=True))
    assert fingerprint(Blend(0.7)) != fingerprint(Blend(0.7001))


def test_worst_of_these_is_the_and_of_all_attacks_on_the_same_images(tmp_path, monkeypatch):
    """Four images; each attack breaks another one; naturally wrong ones count as broken for every attack."""
    records = {"midrun": [[1, 1, 1, 1], [1, 1, 1, 0]], "last-mid-run": [[1, 1, 1, 1], [1, 1, 0, 1]],
               "around": [[1, 1, 1, 1], [1, 1, 1, 0]], "through-G": [[1, 1, 1, 0], [1, 0, 1, 0]],
               "last-Fixer": [[1, 1, 1, 1], [0, 1, 1, 1]]}
    lab, asked = lab_of(tmp_path, "--images", 4), {}
    lab.phases = ((Blend(1.0), None), (Blend(1.0), None))

    def attack(name, defence, last=0, **changes):
        asked[name] = (defence, last, changes)
        return torch.tensor(records.get(name, [[1, 1, 1, 1], [0, 0, 0, 0]]), dtype=torch.bool), None
    lab.attack = attack
    transferred = iter(["f", "G"])
    lab.transferred = lambda net: next(transferred)
    monkeypatch.setattr(Defence, "predict", lambda self, x, H: lab.y + (torch.arange(4) == 1) * (
        x == "G" and self.f is lab.f))                                          # breaks image 1 of the mid-run defence
    rows = fixer.table_5_1(lab)
    assert rows["natural acc, mid-run"] == 1 and rows["natural acc, + Fixer"] == 0.75
    assert rows["robust acc, mid-run (BPDA+EOT)"] == rows["robust acc, mid-run (PGD images of G alone)"] == 0.75
    assert rows["robust acc, mid-run (worst of these)"] == 0.25 and rows["robust acc, + Fixer (worst of these)"] == 0.25
    assert rows["robust acc, + Fixer (BPDA+EOT around G, T)"] == 0.75
    assert rows["robust acc, + Fixer (BPDA+EOT through G)"] == 0.5
    assert rows["robust acc, + Fixer (PGD images of f)"] == 0.75
    assert isinstance(asked["around"][0].sampler, Fixed) and asked["around"][0].f is lab.f
    assert asked["through-G"][0].sampler is lab.sampler and isinstance(asked["through-G"][0].f, nn.Sequential)
    assert asked["last-Fixer"][1:] == asked["last-mid-run"][1:] == (lab.s.last, {"n": lab.s.n_last})
    assert asked["midrun"][1:] == asked["around"][1:] == asked["through-G"][1:] == (0, {})


def test_pgd_of_torchattacks_goes_no_further_than_ours_on_g_and_f(tmp_path, exact):
    """G and f without chains, so that both attack the same function; from the images, no random start."""
    torchattacks = pytest.importorskip("torchattacks")
    lab = lab_of(tmp_path, "--f-iters", 60, "--images", 50, "--natural", 50, "--eps", 0.06, "--step", 0.01, "--n", 20)
    fG = behind(lab.fixer, lab.f)
    theirs = torchattacks.PGD(fG, eps=0.06, alpha=0.01, steps=20)(lab.x, lab.y)
    ours = lab.transferred(fG)
    held = [(fG(x).argmax(1) == lab.y).sum().item() for x in (lab.x, theirs, ours)]
    assert (ours - lab.x).abs().max() <= 0.06 + 1e-6
    assert held[0] >= 10 and held[2] <= held[1] + 1 and held[2] < held[0]


def test_eot_pgd_of_torchattacks_goes_no_further_than_ours_on_the_whole_defence(tmp_path, exact):
    """Chains that add noise, G, f; theirs sees T as the identity by a straight-through sum, as ours does."""
    torchattacks = pytest.importorskip("torchattacks")
    lab = lab_of(tmp_path, "--f-iters", 100, "--images", 40, "--pairs", 100, "--batch", 20, "--eps", 0.1, "--step", 0.025,
                 "--n", 15, "--h-adv", 4, "--h-def", 16)
    lab.sampler = Noise(0.1)
    defence = lab.defence(lab.f, lab.fixer)

    class StraightThrough(nn.Module):
        def forward(self, x):
            return defence.f(x + (lab.sampler(x, lab.s.k)[0] - x).detach())
    theirs = torchattacks.EOTPGD(StraightThrough().eval(), eps=0.1, alpha=0.025, steps=15, eot_iter=4)(lab.x, lab.y)
    record, ours = lab.attack("a", defence)
    natural, held = (int(lab.right(defence.predict(x, 16), slice(None)).sum()) for x in (lab.x, theirs))
    assert natural >= 25 and int(record[-1].sum()) <= held + 2 < natural
    assert (ours - lab.x).abs().max() <= 0.1 + 1e-6


def test_stronger_attacks_are_those_they_are_called(tmp_path):
    lab, asked = lab_of(tmp_path, "--n", 5, "--step", 0.04), []
    lab.phases = ((Blend(1.0), None), (Blend(1.0), None))
    broken = iter([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3])

    def attack(name, defence, last=0, images=0, **changes):
        kind = "around" if isinstance(defence.sampler, Fixed) else "G" if isinstance(defence.f, nn.Sequential) else "T"
        asked.append((kind, images, changes))
        return torch.stack([torch.ones(4), torch.arange(4) != next(broken)]).bool(), None
    lab.attack = attack
    rows = fixer.stronger(lab)
    changes = [{}, {"n": 20}, {"restarts": 3}, {"n": 10, "step": 0.01}]
    assert asked == [(kind, 4, change) for kind in ("T", "G", "around") for change in changes]
    assert rows["robust acc, + Fixer, through G (20 steps)"] == 0.75
    assert rows["robust acc, mid-run (worst of these)"] == 0.75 and rows["robust acc, + Fixer (worst of these)"] == 0.25


# --- upper bound ---


def test_the_share_of_the_gap_that_is_closed(tmp_path, monkeypatch):
    """Ten images, f reads nine; two chains each. One chain: 5 purified, 8 fixed, one of them spoiled."""
    lab, y = SimpleNamespace(), torch.arange(10)
    lab.s, lab.natural = SimpleNamespace(h_def=2), (torch.zeros(10, 1, 1, 1), y)
    lab.f, lab.fixer = None, None
    right = torch.ones(2, 2, 10)                                                # [defence, chain, image]
    right[0, 0, 5:], right[1, 0, 4], right[1, 0, 9] = 0, 0, 0
    logits = torch.where(right[..., None] > 0, 1.0, -1.0) * F.one_hot(y, 10)    # wrong: any other class
    monkeypatch.setattr(fixer, "behind", lambda G, f: None)
    monkeypatch.setattr(fixer, "same_chains", lambda lab, x, H, nets: dict(zip(nets, logits)))
    monkeypatch.setattr(fixer, "outputs", lambda f, x: F.one_hot(torch.where(y < 9, y, 0), 10))
    rows = fixer.upperbound(lab)
    assert rows["natural acc, f(x)"] == pytest.approx(0.9)
    assert rows["natural acc, f(T(x)), one chain"] == 0.5
    assert rows["natural acc, f(G(T(x))), one chain"] == pytest.approx(0.8)
    assert (rows["repaired, one chain"], rows["spoiled, one chain"]) == (4, 1)
    assert rows["share of the gap closed, one chain"] == pytest.approx(3 / 4)
    assert rows["n"] == 10


def test_networks_are_compared_on_the_very_same_chains(tmp_path):
    lab = lab_of(tmp_path, "--chunk", 6)
    found = fixer.same_chains(lab, lab.x, 3, {"a": lab.f, "b": lab.f})
    assert found["a"].shape == (3, 8, 10) and torch.equal(found["a"], found["b"])
    assert not torch.equal(found["a"][0], found["a"][1])


# --- the energy of the other script ---


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


def test_a_missing_energy_is_made_by_a_command(tmp_path, outcome, monkeypatch, capsys):
    asked = ran(monkeypatch, makes=lambda: energy_file(tmp_path / "runs"))
    flags = ("--budget", "smoke", "--out", tmp_path / "runs", "--device", "cpu", "--seed", 7, "--only", "figure5.2")
    monkeypatch.chdir(tmp_path)
    args = fixer.get_args([str(flag) for flag in flags])
    fixer.Lab(args)
    assert "running python lifecycle_midrun.py" in capsys.readouterr().out
    (_, script, *rest), = asked
    assert script.endswith("lifecycle_midrun.py") and rest[:2] == ["--only", "figure3.2"]
    told = dict(zip(rest[2::2], rest[3::2]))
    assert told == {"--dataset": "glyphs", "--budget": "smoke", "--out": str(tmp_path / "runs"), "--data-dir": "data",
                    "--seed": "7", "--device": "cpu"}
    fixer.Lab(args)                                                             # it is there now
    assert len(asked) == 1


@pytest.mark.parametrize("changes", [{"it": 5}, {"made": {"budget": "smoke"}}])
def test_an_unfinished_energy_or_one_of_a_smoke_run_does_not_do(tmp_path, monkeypatch, changes):
    energy_file(tmp_path / "runs", **{"made": {"budget": "quick"}} | changes)
    asked = ran(monkeypatch, makes=lambda: energy_file(tmp_path / "runs", made={"budget": "quick"}))
    fixer.Lab(fixer.get_args(["--out", str(tmp_path / "runs"), "--device", "cpu"]))
    assert len(asked) == 1


def test_a_failed_command_is_one_line(tmp_path, outcome, monkeypatch):
    ran(monkeypatch, code=2)
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    assert code == 2 and "exit code 2" in err and "lifecycle_midrun.py" in err and err.count("\n") == 1


def test_energies_that_cannot_be_used(tmp_path, outcome, monkeypatch):
    asked = ran(monkeypatch)
    flags = ("--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu")
    torn = tmp_path / "torn.pt"
    torn.write_bytes(b"torn")
    foreign = energy_file(tmp_path / "f")                                       # a checkpoint, but of something else
    state = torch.load(foreign, weights_only=True)
    state["made_with"].pop("net")
    torch.save(state, foreign)
    for file, says in ((torn, "not a checkpoint"), (foreign, "not a checkpoint"), (tmp_path / "none.pt", "no such file"),
                       (energy_file(tmp_path / "a", shape=(3, 32, 32)), "images (3, 32, 32)"),
                       (energy_file(tmp_path / "b", it=3), "not finished")):
        code, err = outcome(fixer, *flags, "--energy", file)
        assert code == 2 and says in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert not asked
    assert outcome(fixer, *flags, "--energy", energy_file(tmp_path / "c"), "--only", "figure5.2")[0] == 0


def test_pairs_and_fixer_of_another_energy_are_refused(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", "figure5.2")
    file = energy_file(tmp_path)
    assert outcome(fixer, *flags) == (0, "")
    state = torch.load(file, weights_only=True)
    state["V"]["body.0.weight"] += 0.01
    torch.save(state, file)
    code, err = outcome(fixer, *flags)
    assert code == 2 and "energy" in err and err.count("\n") == 1
    assert outcome(fixer, *flags, "--fresh") == (0, "") and file.exists()


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    """From nothing: the energy is made by the other script, in a process of its own."""
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", *fixer.EXPERIMENTS)
    assert (code, err) == (0, "")
    assert (tmp_path / "lifecycle_midrun-glyphs" / "energy.pt").exists()
    folder = tmp_path / "fixer-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(fixer.EXPERIMENTS)
    for name, entry in results.items():
        for key, value in entry["ours"].items():
            values = value if isinstance(value, list) else [value]
            assert all(isinstance(v, str) or math.isfinite(v) for v in values), (name, key)
            if "acc" in key and not isinstance(value, list):
                low, high = entry["ours"][f"{key}, 95 %"]
                assert 0 <= low <= value <= high <= 1
    ours = results["table5.1"]["ours"]
    for title, count in (("mid-run", 5), ("+ Fixer", 6)):
        attacks = [v for k, v in ours.items() if k.startswith(f"robust acc, {title} (") and not k.endswith("95 %")]
        assert len(attacks) == count and ours[f"robust acc, {title} (worst of these)"] == min(attacks)
        assert ours[f"natural acc, {title}"] >= max(attacks)
    assert ours["loss network"] == results["figure5.2"]["ours"]["loss network"] == "small_cnn (f), layer body.8"
    assert results["table5.1"]["published"] == {}
    for picture in ("figure5.2", "figure5.3", "ablation"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def test_smoke_run_on_colour(tmp_path, write_npz, outcome):
    data = write_npz("cifar10")
    energy_file(tmp_path, "cifar10", (3, 32, 32))
    flags = ("--dataset", "cifar10", "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(fixer, *flags, "--only", *fixer.EXPERIMENTS) == (0, "")


def test_smoke_run_on_a_folder_with_pretrained_networks(tmp_path, outcome, monkeypatch):
    random = np.random.RandomState(0)
    for split, n in (("train", 14), ("val", 8)):
        for i in range(n):
            file = tmp_path / "data" / "imagenet" / split / f"n0{i % 4}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (230, 240, 3), dtype=np.uint8)).save(file)
    energy_file(tmp_path, "imagenet", (3, 224, 224))

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 1000))

        def forward(self, x):
            return self.classifier(self.features(x))
    monkeypatch.setattr(common.torchvision.models, "get_model", lambda name, weights: Tiny())
    flags = ("--dataset", "imagenet", "--budget", "smoke", "--data-dir", tmp_path / "data", "--out", tmp_path,
             "--device", "cpu", "--images", 2, "--natural", 2, "--pairs", 4, "--held", 2, "--batch", 2, "--mse-epochs", 1)
    code, err = outcome(fixer, *flags)
    assert code == 2 and common.VGGMaps.FILE in err
    vgg_file(tmp_path, monkeypatch)
    for more, says in ((("--loss-net", "f"), "not --loss-net f"), (("--f-iters", 5), "--f-iters 0")):
        code, err = outcome(fixer, *flags[:-2], *flags[-2:], *more, *(("--budget", "quick") if "5" in str(more) else ()))
        assert code == 2 and says in err
    assert outcome(fixer, *flags, "--layer", 4, "--only", "table5.1", "figure5.3") == (0, "")
    ours = json.loads((tmp_path / "fixer-imagenet" / "results.json").read_text())["table5.1"]
    assert ours["ours"]["loss network"] == "VGG-16, layer 4" and ours["energy"]["net"] == "biggan_deep"
    assert set(ours["published"]) <= set(ours["ours"])                          # beside ours in the closing table


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "at least 0"), (("--tau", "0"), "above 0"), (("--last", "500"), "at most --k"),
    (("--batch", "1"), "at least 2"), (("--batch", "9", "--pairs", "8"), "at most --pairs"),
    (("--patience", "0"), "at least 1"), (("--mse-epochs", "0"), "at least 1"),
    (("--other-net", "small_cnn", "--other-width", "1"), "another architecture"), (("--loss-net", "vgg"), "vgg16, f or auto"), (("--loss-net", "vgg16"), "vgg16-"),
    (("--f-layer", "body.99"), "no feature maps"), (("--other-net", "nothing"), "unknown network"),
    (("--pairs", "10000"), "10000 for training"), (("--natural", "2001"), "2000 images"), (("--k", "0"), "at least 1"),
    (("--dataset", "flowers"), "unknown --dataset"), (("--only", "figure9"), "unknown experiment")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, monkeypatch, flags, says):
    asked = ran(monkeypatch)
    code, err = outcome(fixer, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not asked


def test_settings_are_the_published_ones():
    s = fixer.SETTINGS["imagenet"]["paper"]
    assert (s.mse_epochs, s.perceptual_epochs) == (40, 100)                     # sec. 5.2.1
    assert (s.k, 2 * s.tau, s.h_def, s.h_adv, s.n, s.eps, s.step) == (200, .02, 64, 24, 50, 2 / 255, 1 / 255)
    assert fixer.PUBLISHED_5_1["imagenet"] == {
        "natural acc, mid-run": .684, "robust acc, mid-run (BPDA+EOT)": .418, "natural acc, + Fixer": .742,
        "robust acc, + Fixer (BPDA+EOT around G, T)": .498}


def test_the_script_runs_as_a_command(tmp_path):
    done = subprocess.run([fixer.sys.executable, fixer.__file__, "--list"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "table5.1" in done.stdout and "published, imagenet" in done.stdout
