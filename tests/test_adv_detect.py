"""adv_detect.py: the joined network, losses by hand, attacks, training together and alone, rates, bisection, the script."""
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adv_detect
import common
from adv_detect import Attack, Detectors, best_other, minimise, own_logit


def lab_of(tmp_path, *flags, name="runs"):
    argv = ["--budget", "smoke", "--out", str(tmp_path / name), "--device", "cpu", *map(str, flags)]
    return adv_detect.Lab(adv_detect.get_args(argv))


def small_nets(K, shape=(1, 28, 28), name="mnist_cnn", width=0.1):
    nets = [common.make_net(name, 1, shape, width).eval() for _ in range(K)]
    for m in (m for net in nets for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        m.running_mean.normal_()
        m.running_var.uniform_(0.5, 2)
        nn.init.normal_(m.weight)
    return nets


class Linear(nn.Module):
    """z_k(x) = <w_k, x>: in place of Detectors."""

    def __init__(self, K, shape):
        super().__init__()
        self.K, self.w = K, nn.Parameter(torch.randn(K, *shape))

    def each(self, x):
        return (self.w[:, None] * x).sum((-3, -2, -1))

    def forward(self, x):
        return (self.w * x[:, None]).sum((-3, -2, -1))


class Killed(Exception):
    pass


# --- K networks as one ---


@pytest.mark.parametrize("name, shape", [("mnist_cnn", (1, 28, 28)), ("madry_wrn", (3, 32, 32))])
def test_detectors_side_by_side_are_the_detectors(name, shape):
    nets = small_nets(3, shape, name)
    H, x = Detectors(nets), torch.rand(3, 4, *shape)
    expected = torch.stack([net(part)[:, 0] for net, part in zip(nets, x)])
    assert expected.std(1).min() > 1e-4 and not torch.allclose(expected[0], expected[1], atol=1e-3)
    assert torch.allclose(H.each(x), expected, atol=1e-5, rtol=1e-4)
    everywhere = torch.cat([net(x[1]) for net in nets], 1)                      # [4, 3]
    assert torch.allclose(H(x[1]), everywhere, atol=1e-5, rtol=1e-4)
    for k, net in enumerate(nets):
        apart = common.part_of(H.nets, 3, k, common.make_net(name, 1, shape, 0.1)).eval()
        assert all(torch.equal(v, net.state_dict()[key]) for key, v in apart.state_dict().items())


def test_detectors_do_not_see_each_other_s_images():
    H, x = Detectors(small_nets(3, (3, 32, 32), "madry_wrn")), torch.rand(3, 2, 3, 32, 32, requires_grad=True)
    gradient, = torch.autograd.grad(H.each(x)[1].sum(), x)
    assert gradient[1].abs().sum() > 0 and gradient[[0, 2]].abs().sum() == 0


def test_a_layer_that_cannot_be_grouped_is_refused():
    with pytest.raises(TypeError, match="GroupNorm"):
        common.side_by_side([nn.Sequential(nn.GroupNorm(1, 3)) for _ in range(2)])


def test_published_sizes_and_table_3_1():
    for name, shape, outputs, size in (("mnist_cnn", (1, 28, 28), 1, 3_265_409), ("mnist_cnn", (1, 28, 28), 10, 3_274_634),
                                       ("madry_wrn", (3, 32, 32), 10, 45_901_914)):
        with torch.device("meta"):
            assert sum(p.numel() for p in common.make_net(name, outputs, shape).parameters()) == size
    grey, colour = adv_detect.GREY["models"], adv_detect.COLOUR["models"]
    assert {name: (a.norm, a.eps, a.steps, a.step, b.steps, b.step, a.adam) for name, (a, b) in grey.items()} == {
        "linf0.3": ("inf", .3, 100, .01, 200, .01, True), "linf0.5": ("inf", .5, 100, .01, 200, .01, True),
        "l2-2.5": ("2", 2.5, 100, .1, 200, .1, True), "l2-5.0": ("2", 5.0, 200, .1, 200, .1, True)}
    a, b = colour["linf8"][0], colour["l2-80"][0]
    assert (a.eps * 255, a.steps, a.step * 255, a.adam, a.box_first) == (8, 40, 0.5, False, False)
    assert (b.eps * 255, b.steps, round(b.step * 255, 9), b.adam) == (80, 20, 10, False)


def test_madry_s_network_standardises_and_widens():
    x = torch.rand(2, 6, 8, 8)
    x[1, 3:] = 0.5                                                              # one colour: no division by 0
    layer = common.Standardise()
    layer.groups = 2
    z = layer(x)
    for i, part in ((0, slice(0, 3)), (0, slice(3, 6)), (1, slice(0, 3))):
        assert z[i, part].mean().abs() < 1e-5 and z[i, part].std(correction=0) == pytest.approx(1, abs=1e-4)
    assert z[1, 3:].abs().max() < 1e-3
    faint = torch.zeros(1, 1, 2, 2)
    faint[0, 0, 0, 0] = 1e-4                                                    # deviation below 1 / (255 * 2)
    assert common.Standardise()(faint).max() == pytest.approx((1e-4 * 0.75) * 255 * 2, rel=1e-4)
    assert common.MadryBlock(4, 4, 2, False)(torch.rand(2, 4, 8, 8)).shape == (2, 4, 4, 4)
    for early in (True, False):                                                 # body at 0: the shortcut alone
        block, y = common.MadryBlock(2, 4, 1, early).eval(), torch.randn(2, 2, 8, 8)
        nn.init.zeros_(block.body[-1].weight)
        assert torch.equal(block(y)[:, 1:3], block.before(y) if early else y)
    y = common.Widen(2, 5, 2)(x[:, :2])
    assert y.shape == (2, 5, 4, 4) and torch.equal(y[:, 1:3], F.avg_pool2d(x[:, :2], 2))
    assert y[:, [0, 3, 4]].abs().max() == 0


# --- losses: a hand-made example of three classes ---


Z_F = torch.tensor([[2.0, 0.5, -1.0], [0.2, 0.1, 3.0], [-1.0, -2.0, -0.5]])     # right; fooled; fooled
Z_H = torch.tensor([[5.0, -4.0, -3.0], [6.0, -7.0, -2.0], [4.0, 0.5, 3.0]])
Y = torch.tensor([0, 0, 1])


def test_losses_by_hand():
    assert best_other(Z_F, Y).tolist() == pytest.approx([0.5, 3.0, -0.5])
    assert own_logit(Z_F, Y).tolist() == pytest.approx([2, .2, -2])
    assert adv_detect.classifier_loss(Z_F, None, Y).tolist() == pytest.approx([1.5, -2.8, -1.5])
    assert adv_detect.detector_loss(None, Z_H, Y).tolist() == pytest.approx([3.0, 2.0, -4.0])
    # class K + 1: (1 + 3) 2 = 8, (1 + 2) 3 = 9, (1 - 4) (-.5) = 1.5; against own logits 2, .2, -2
    assert adv_detect.combined_loss(Z_F, Z_H, Y).tolist() == pytest.approx([8 - 0.5, 9 - 3.0, 1.5 + 0.5])
    sure = torch.full((3, 3), 9.0)                                              # accepted: the K + 1st is below the own logit
    z_f = torch.tensor([[2.0, 1.5, -1.0]])
    assert adv_detect.combined_loss(z_f, sure[:1], Y[:1]).item() == pytest.approx(2.0 - 1.5)
    z_f = torch.tensor([[1.0, 4.0, -1.0]])                                      # fooled and accepted: not flat at 0
    assert adv_detect.combined_loss(z_f, sure[:1], Y[:1]).item() == pytest.approx(1.0 - 4.0)
    assert adv_detect.switching_loss(Z_F, Z_H, Y).tolist() == pytest.approx([1.5, 2.0, -4.0])
    # joint: min of margins over y (-1.5, -3; -.1, 2.8; 1, 1.5) and of z_H (-4, -3; -7, -2; 4, 3), the larger of two
    assert adv_detect.joint_loss(Z_F, Z_H, Y).tolist() == pytest.approx([3.0, 2.0, -1.5])


def test_the_switch_of_3_35_goes_by_image_at_every_step_and_carries_no_gradient(exact):
    z_f, z_H = Z_F.clone().requires_grad_(True), Z_H.clone().requires_grad_(True)
    adv_detect.switching_loss(z_f, z_H, Y).sum().backward()
    assert z_f.grad.tolist() == [[1, -1, 0], [0, 0, 0], [0, 0, 0]]
    assert z_H.grad.tolist() == [[0, 0, 0], [0, 0, -1], [-1, 0, 0]]
    tied = torch.tensor([[1.0, 1.0, 0.0]])                                      # >=: not fooled yet
    assert adv_detect.switching_loss(tied, Z_H[:1], Y[:1]).item() == 0.0

    def f(x):  # fooled beyond .5
        return torch.stack([1 - 2 * x[..., 0, 0, 0], 0 * x[..., 0, 0, 0]], -1)

    def H(x):  # the second pixel deceives the detector
        return torch.stack([0 * x[..., 0, 0, 0], x[..., 0, 0, 1]], -1)
    seen = []

    def loss(x):
        seen.append(x.detach().flatten().tolist())
        return adv_detect.switching_loss(f(x), H(x), torch.tensor([0]))
    minimise(loss, torch.zeros(1, 1, 1, 2), Attack("inf", 1.0, 8, 0.2, adam=False))
    first, second = zip(*seen)
    assert second[:4] == (0, 0, 0, 0) and first[3] == pytest.approx(0.6)        # fools f first ...
    assert second[4:] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and set(first[3:]) == {first[3]}  # ... then the detector


# --- attacks ---


def test_adam_is_adam_and_fresh_in_every_call(exact):
    H, x0 = Linear(2, (1, 4, 4)), torch.rand(2, 3, 1, 4, 4)
    a = Attack("inf", 0.1, 7, 0.02)

    def loss(x):
        return (H.each(x) - 0.3).square() + x.square().sum((-3, -2, -1))
    delta = nn.Parameter(torch.zeros_like(x0))
    optimizer = torch.optim.Adam([delta], lr=0.02)
    for _ in range(7):
        optimizer.zero_grad()
        loss(x0 + delta).sum().backward()
        optimizer.step()
        with torch.no_grad():
            delta.copy_(((x0 + delta).clamp(0, 1) - x0).clamp(-0.1, 0.1))
    once = minimise(loss, x0, a)
    assert torch.allclose(once, x0 + delta, atol=1e-5) and (once - x0).abs().max() > 0.05
    assert torch.equal(minimise(loss, x0, a), once)                             # nothing is left of the first call
    apart = torch.cat([minimise(loss, x0[:, i:i + 1], a) for i in range(3)], 1)
    assert torch.allclose(apart, once, atol=1e-5)                               # images do not influence each other


def test_attacks_leave_weights_and_their_gradients_alone():
    H, x = Detectors(small_nets(2)), torch.rand(2, 3, 1, 28, 28)
    minimise(lambda x: -H.each(x), x, Attack("inf", 0.1, 2, 0.05))
    assert all(p.grad is None for p in H.parameters())


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("adam", [True, False])
@pytest.mark.parametrize("box_first", [True, False])
def test_attacks_climb_inside_the_ball_and_the_box(norm, adam, box_first):
    H, x0 = Detectors(small_nets(2)), torch.rand(2, 3, 1, 28, 28)
    x0[0, 0] = 0.5
    eps, step = {"inf": (0.1, 0.03), "2": (1.5, 0.4)}[norm]
    x = minimise(lambda x: -H.each(x), x0, Attack(norm, eps, 6, step, adam, box_first))
    size = (x - x0).abs().amax((2, 3, 4)) if norm == "inf" else (x - x0).flatten(2).norm(dim=2)
    assert x.min() >= 0 and x.max() <= 1 and size.max() <= eps * 1.0001 and size.min() > eps / 2
    assert (H.each(x) > H.each(x0)).all()


def test_steps_by_hand(exact):
    x0 = torch.full((1, 1, 1, 2), 0.5)
    slope = torch.tensor([[[[3.0, -4.0]]]])

    def loss(x):
        return (x * slope).sum((-3, -2, -1))

    def go(*a, x0=x0):
        return minimise(loss, x0, Attack(*a)).flatten().tolist()
    assert go("2", 9.0, 1, 0.1, False) == pytest.approx([0.5 - 0.06, 0.5 + 0.08])
    assert go("inf", 9.0, 1, 0.1, False) == pytest.approx([0.4, 0.6])
    assert go("2", 0.05, 3, 0.1, False) == pytest.approx([0.5 - 0.03, 0.5 + 0.04])
    corner = torch.tensor([[[[0.0, 0.5]]]])                                     # the box takes the first pixel's part away
    assert go("2", 0.05, 1, 0.1, False, True, x0=corner) == pytest.approx([0.0, 0.55])   # box, then ball
    assert go("2", 0.05, 1, 0.1, False, False, x0=corner) == pytest.approx([0.0, 0.54])  # ball, then box
    still = minimise(lambda x: 0 * x.sum((-3, -2, -1)), x0, Attack("2", 1.0, 2, 0.1, False))
    assert torch.equal(still, x0)                                               # a zero gradient moves nothing
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        minimise(loss, x0 + 1, Attack("2", 1.0, 1, 0.1))


def test_random_starts(exact):
    x0 = torch.full((1, 4000, 1, 4, 4), 0.95)
    cube = adv_detect.scattered(x0, "inf", 0.3) - x0
    assert cube.abs().max() <= 0.3001 and cube.std() == pytest.approx(0.6 / math.sqrt(12), rel=0.02)
    assert (x0 + cube).max() > 1.2                                              # not clipped to the box
    size = (adv_detect.scattered(x0, "2", 2.0) - x0).flatten(2).norm(dim=2).flatten().sort().values
    assert torch.allclose(size, torch.linspace(0, 2, 4000), atol=0.06)          # uniform in radius
    x = minimise(lambda x: x.sum((-3, -2, -1)), x0[:, :5], Attack("inf", 0.3, 1, 0.0), adv_detect.scattered(x0[:, :5], "inf", 0.3))
    assert (x - x0[:, :5]).abs().max() > 0.1 and x.max() <= 1                   # it starts there, not at the image


class TwoSided(nn.Module):
    """Logits [z, 0] [B, 2]: an attack that raises the cross-entropy of class 1 raises z."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z = self.net(x)
        return torch.cat([z, torch.zeros_like(z)], 1)


def test_torchattacks_finds_the_same(exact):
    torchattacks = pytest.importorskip("torchattacks")
    net, x = small_nets(1)[0], torch.rand(6, 1, 28, 28)
    y, both = torch.ones(6, dtype=torch.long), TwoSided(net).eval()
    theirs = torchattacks.PGD(both, eps=0.1, alpha=0.03, steps=8, random_start=False)(x, y)
    ours = minimise(lambda x: -net(x)[:, 0], x, Attack("inf", 0.1, 8, 0.03, False, False))
    assert (ours - theirs).abs().max() < 1e-4
    theirs = torchattacks.PGDL2(both, eps=1.5, alpha=0.4, steps=8, random_start=False)(x, y)
    ours = minimise(lambda x: -net(x)[:, 0], x, Attack("2", 1.5, 8, 0.4, False, False))
    assert (ours - theirs).abs().max() < 1e-3
    for norm, eps in (("inf", 0.1), ("2", 1.5)):
        attack = torchattacks.APGD(both, norm="L" + norm, eps=eps, steps=30, n_restarts=1, loss="ce", seed=0)
        ours = adv_detect.apgd(lambda x: -net(x)[:, 0], x, Attack(norm, eps, 30, 0))
        with torch.no_grad():
            start, found, reached = (net(z)[:, 0] for z in (x, ours, attack(x, y)))
        tried = reached > start                                                 # (theirs stops where y is lost, and starts anywhere)
        assert tried.sum() >= 4 and (found - start)[tried].mean() > 0.95 * (reached - start)[tried].mean()


@pytest.mark.parametrize("adam", [True, False])
def test_bfloat16_gradients_attack_as_well(adam):
    net, x = small_nets(1)[0], torch.rand(20, 1, 28, 28)
    a = Attack("inf", 0.1, 10, 0.02, adam)
    with torch.no_grad():
        gain = [(net(minimise(lambda x: -net(x)[:, 0], x, a, fast=fast)) - net(x)).mean() for fast in (True, False)]
    assert gain[0] > 0.1 and gain[0] == pytest.approx(gain[1].item(), rel=0.03)


def test_apgd_finds_the_optimum_that_fixed_steps_miss(exact):
    x0, target = torch.full((1, 2, 1, 3, 3), 0.5), torch.rand(1, 2, 1, 3, 3) * 0.3 + 0.4
    seen = []

    def loss(x):
        seen.append((x - target).square().sum((-3, -2, -1)))
        return seen[-1]
    x = adv_detect.apgd(loss, x0, Attack("inf", 0.2, 60, 0))
    least = torch.stack(seen).detach().amin(0)
    assert torch.allclose((x - target).square().sum((-3, -2, -1)), least) and least.max() < 1e-3
    fixed = minimise(loss, x0, Attack("inf", 0.2, 60, 0.1, False))
    assert (loss(fixed) > 10 * least).all()
    x = adv_detect.apgd(lambda x: x.sum((-3, -2, -1)), x0, Attack("inf", 0.2, 5, 0))
    assert torch.allclose(x, x0 - 0.2)


@pytest.mark.parametrize("norm, eps", [("inf", 0.2), ("2", 1.0)])
def test_random_search_needs_no_gradient_and_never_goes_up(norm, eps):
    H, x0, values = Linear(2, (1, 8, 8)), torch.rand(2, 5, 1, 8, 8), []

    def loss(x):
        assert not torch.is_grad_enabled()
        value = -H.each(x)
        values.append(value)
        return value
    x = adv_detect.random_search(loss, x0, Attack(norm, eps, 60, 0))
    size = (x - x0).abs().amax((2, 3, 4)) if norm == "inf" else (x - x0).flatten(2).norm(dim=2)
    assert x.min() >= 0 and x.max() <= 1 and size.max() <= eps * 1.0001
    found = -H.each(x)
    assert torch.allclose(found, torch.stack(values).amin(0), atol=1e-5)        # the lowest that it met
    assert (found < -H.each(x0) - 0.1).all()
    assert len({tuple(row) for row in (x - x0).abs().sum(3).flatten(0, 1)[:, 0].round(decimals=4).tolist()}) > 5  # own squares


# --- training ---


def test_together_is_one_after_the_other(exact, monkeypatch):
    """Updates of three detectors as one network, and of each alone: the same weights within rounding."""
    monkeypatch.setattr(adv_detect, "scattered", lambda x, norm, eps: (x + eps / 2).clamp(0, 1))
    nets, a = small_nets(3), Attack("inf", 0.2, 3, 0.1)
    H = Detectors(nets)
    optimizer = torch.optim.SGD(H.parameters(), 0.1, momentum=0.9)              # (Adam would hide a factor)
    alone = [Detectors([net]) for net in nets]
    optimizers = [torch.optim.SGD(one.parameters(), 0.1, momentum=0.9) for one in alone]
    for _ in range(3):
        x_pos, x_neg = torch.rand(2, 3, 4, 1, 28, 28)
        z, losses = adv_detect.train_step(H, optimizer, x_pos, x_neg, a)
        for k in range(3):
            z_k, loss = adv_detect.train_step(alone[k], optimizers[k], x_pos[k:k + 1], x_neg[k:k + 1], a)
            assert torch.allclose(z[:, k], z_k[:, 0], atol=1e-4) and loss.item() == pytest.approx(losses[k].item(), abs=1e-4)
            assert losses[k].item() == pytest.approx((F.softplus(-z[0, k]).sum() + F.softplus(z[1, k]).sum()).item() / 8, rel=1e-5)
    for k in range(3):
        found = common.part_of(H.nets, 3, k, small_nets(1)[0]).state_dict()
        for key, value in alone[k].nets.state_dict().items():
            moved = (value - nets[k].state_dict()[key]).abs().max()
            assert moved > 1e-4 and (found[key] - value).abs().max() < 0.01 * moved + 1e-6, key


def test_the_attacker_raises_the_logit_that_training_lowers(exact):
    torch.manual_seed(1)
    H, a = Detectors(small_nets(2)), Attack("inf", 0.2, 4, 0.1)
    optimizer = torch.optim.Adam(H.parameters(), 1e-3)
    x_pos, x_neg = torch.rand(2, 2, 8, 1, 28, 28)
    before = H.each(x_neg).detach()
    z = [adv_detect.train_step(H, optimizer, x_pos, x_neg, a)[0] for _ in range(25)]
    assert (z[0][1].mean(1) > before.mean(1)).all()                             # attacked above clean negatives
    assert (z[-1][1].mean(1) < z[0][1].mean(1)).all()                           # and lower for training
    assert (z[-1][0].mean(1) - z[-1][1].mean(1) > z[0][0].mean(1) - z[0][1].mean(1)).all()


def test_batches_hold_their_class_and_others_from_the_training_split(tmp_path):
    lab = lab_of(tmp_path, "--batch", 5)
    x_pos, x_neg = lab.draw(3)
    assert x_pos.shape == x_neg.shape == (10, 5, 1, 28, 28)
    flat = {row.tobytes(): (int(y), i) for i, (row, y) in enumerate(zip(lab.data.x.numpy(), lab.data.y))}
    held = set(lab.splits["validation"][1].tolist())
    assert len(held) == len(lab.data) // 6 and len(held | set(lab.splits["train"][1].tolist())) == len(lab.data)
    for k in range(10):
        for x, inside in ((x_pos[k], True), (x_neg[k], False)):
            found = [flat[(row * 255).round().byte().numpy().tobytes()] for row in x]
            assert all((y == k) == inside and i not in held for y, i in found)
    again = lab.draw(3)
    assert torch.equal(again[0], x_pos) and torch.equal(again[1], x_neg) and not torch.equal(lab.draw(4)[0], x_pos)


def test_each_detector_keeps_the_weights_of_its_own_best_validation(tmp_path, monkeypatch):
    made_up, after = [[0.6, 0.5, *[0.1] * 8], [0.5, 0.7, *[0.1] * 8], [0.4, 0.6, *[0.2] * 8]], []

    def auc(self, H, a, ks, n, split):
        assert split == "validation" and len(ks) == 10 and n == 4 and a.steps == 2
        after.append(copy.deepcopy(H.nets))
        return made_up[len(after) - 1], n
    monkeypatch.setattr(adv_detect.Lab, "auc", auc)
    lab = lab_of(tmp_path, "--updates", 5, "--val-every", 2)                    # after 2, 4, 5
    best, aucs = lab.trained("linf0.3")
    assert aucs.tolist() == pytest.approx([0.6, 0.7, *[0.2] * 8]) and len(after) == 3
    net = common.make_net("mnist_cnn", 1, (1, 28, 28), 0.1)
    for k, when in ((0, 0), (1, 1), (5, 2)):
        parts = [copy.deepcopy(common.part_of(wide, 10, k, net).state_dict()) for wide in (best.nets, *after)]
        same = [all(torch.equal(parts[0][key], part[key]) for key in part) for part in parts[1:]]
        assert same == [i == when for i in range(3)]
    again = lab_of(tmp_path, "--updates", 5, "--val-every", 2).trained("linf0.3")   # from the checkpoint
    assert torch.equal(again[1], aucs) and all(torch.equal(a, b) for a, b in zip(again[0].parameters(), best.parameters()))


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    whole = lab_of(tmp_path, "--updates", 4, name="whole").trained("l2-2.5")
    step, calls = torch.optim.Adam.step, []

    def dying(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return step(self, *args, **options)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    with pytest.raises(Killed):
        lab_of(tmp_path, "--updates", 4, name="broken").trained("l2-2.5")
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    torch.manual_seed(99)
    again = lab_of(tmp_path, "--updates", 4, name="broken").trained("l2-2.5")
    assert len(calls) == 4 and torch.equal(again[1], whole[1])
    assert all(torch.equal(a, b) for a, b in zip(again[0].parameters(), whole[0].parameters()))


def test_fine_tuning_starts_as_the_classifier_and_leaves_batchnorm_s_statistics(tmp_path, write_npz, exact):
    folder = write_npz("cifar10", 360)
    lab = lab_of(tmp_path, "--dataset", "cifar10", "--data-dir", folder, "--val-images", 2)
    H, optimizer = adv_detect.new_detectors(lab)
    x = lab.test_images(5)[0]
    assert torch.allclose(H(x), lab.f(x), atol=1e-4) and lab.f(x).std() > 1e-3
    norms = [m for m in H.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean.clone(), m.weight.detach().clone()) for m in norms]
    x_pos, x_neg = lab.draw(0)
    z, _ = adv_detect.train_step(H, optimizer, x_pos, x_neg, lab.attacks("linf8")[0])
    assert norms and not any(m.training for m in norms)
    assert all(torch.equal(m.running_mean, mean) for m, (mean, _) in zip(norms, before))
    assert any(not torch.equal(m.weight, weight) for m, (_, weight) in zip(norms, before))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[0]["lr"] == 1e-3
    for name, p in H.named_parameters():
        assert decay[id(p)] == (2e-4 if p.dim() > 1 else 0), name


def test_fewer_steps_are_longer(tmp_path):
    lab = lab_of(tmp_path, "--train-steps", 20, "--check-steps", 0)
    a, check = lab.attacks("linf0.5")
    assert (a.steps, a.step, a.eps) == (20, 0.05, 0.5) and (check.steps, check.step) == (200, 0.01)
    assert lab.attacks("l2-5.0")[0] == Attack("2", 5.0, 20, 0.1)                # an l_2 step crosses the ball anyway
    assert adv_detect.GREY["table3.6"].within(7) == Attack("2", math.inf, 7, 0.1)


# --- metrics ---


def test_auroc_is_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    positive, negative = torch.randn(40).round(decimals=1) + 0.5, torch.randn(60).round(decimals=1)
    truth = torch.cat([torch.ones(40), torch.zeros(60)])
    assert len(set(positive.tolist()) & set(negative.tolist())) > 3             # ties
    assert adv_detect.auroc(positive, negative) == pytest.approx(metrics.roc_auc_score(truth, torch.cat([positive, negative])))


def test_rates_by_brute_force():
    z_clean, z_adv = torch.randn(30).round(decimals=1), torch.randn(40).round(decimals=1)
    misread = torch.rand(40) < 0.6
    T = torch.cat([z_clean, z_adv, torch.tensor([-9.0, 9.0])])
    tpr, fpr = adv_detect.detection_rates(z_clean, z_adv, misread, T)
    for t, a, b in zip(T, tpr, fpr):
        assert a.item() == pytest.approx(sum(z >= t for z in z_clean.tolist()) / 30)
        assert b.item() == pytest.approx(sum(z >= t and bool(m) for z, m in zip(z_adv.tolist(), misread)) / 40)
    assert fpr.max() == pytest.approx(misread.float().mean().item()) and fpr.max() < 1
    for share in (0.5, 0.9, 0.95, 1.0):
        best = max(t for t in z_clean.tolist() if sum(z >= t for z in z_clean.tolist()) / 30 >= share)
        assert adv_detect.threshold(z_clean, share) == pytest.approx(best)


def test_bisection_finds_the_distance_to_a_linear_boundary(exact):
    torch.manual_seed(3)
    H = Linear(2, (1, 3, 3))
    H.w.data = 0.3 * F.normalize(H.w.data.flatten(1)).view_as(H.w)
    x0 = 0.5 + 0.02 * torch.randn(2, 4, 1, 3, 3)
    T = H.each(x0).detach() + torch.tensor([[0.01, 0.02, 0.03, 5.0], [0.015, 0.02, 0.025, 0.03]])
    distance = (T - H.each(x0)) / 0.3
    found = adv_detect.smallest_perturbation(H.each, lambda x: H.each(x) >= T, x0, Attack("2", math.inf, 150, 0.01), 20, 8.0)
    assert found[0, 3] == math.inf                                              # out of reach inside the box
    reached = found.isfinite()
    assert reached.sum() == 7 and (found[reached] >= distance[reached] * 0.999).all()
    assert torch.allclose(found[reached], distance[reached], rtol=0.1)
    rounds = [adv_detect.smallest_perturbation(H.each, lambda x: H.each(x) >= T, x0, Attack("2", math.inf, 60, 0.01), n, 8.0)
              for n in (1, 4)]
    assert (rounds[1][reached] < rounds[0][reached] * 0.8).all()                # c = 0 alone goes on to the end


def test_auc_attacks_other_classes_keeps_the_best_start_and_judges_in_float32(tmp_path, monkeypatch):
    lab = lab_of(tmp_path, "--images", 40, "--chunk", 15)
    H, ks, handed = Detectors(small_nets(10)), (3, 1), []

    def method(loss, x, a, start=None):
        handed.append((x, start))
        return x if start is None else start.clamp(0, 1)
    a = Attack("inf", 0.2, 1, 0.1)
    aucs, n = lab.auc(H, a, ks, 40, method=method)
    assert n == 40 and [x.shape[:2] for x, _ in handed] == [(2, 15), (2, 15), (2, 10)]
    of, index = lab.splits["test"]
    for i, (k, found) in enumerate(zip(ks, aucs)):
        others = [j for j in index.tolist() if of.y[j] != k][:40]
        assert torch.equal(torch.cat([x[i] for x, _ in handed]), of.take(torch.tensor(others)))
        inside = torch.tensor([j for j in index.tolist() if of.y[j] == k])
        with torch.no_grad():
            positive, negative = H(of.take(inside))[:, k], H(of.take(torch.tensor(others)))[:, k]
        assert found == pytest.approx(adv_detect.auroc(positive, negative), abs=1e-4)
    handed.clear()
    several, _ = lab.auc(H, a, ks, 40, starts=4, method=method)
    assert len(handed) == 12 and all(start is not None for _, start in handed)
    for i, k in enumerate(ks):
        with torch.no_grad():
            best = torch.cat([torch.stack([H(start[i].clamp(0, 1))[:, k] for _, start in handed[4 * j:4 * j + 4]]).amax(0)
                              for j in range(3)])
            inside = torch.tensor([j for j in index.tolist() if of.y[j] == k])
            assert several[i] == pytest.approx(adv_detect.auroc(H(of.take(inside))[:, k], best), abs=1e-4)
    dtypes = []
    monkeypatch.setattr(adv_detect, "auroc", lambda a, b: dtypes.append((a.dtype, b.dtype)) or 0.5)
    monkeypatch.setattr(adv_detect.Detectors, "each", lambda self, x, each=Detectors.each: each(self, x) + (
        0 if torch.is_grad_enabled() or not torch.is_autocast_enabled("cpu") else math.nan))
    lab.auc(H, a, ks, 40)
    assert set(dtypes) == {(torch.float32, torch.float32)}


# --- figures ---


def test_figure_3_2_counts_what_it_says(tmp_path, monkeypatch):
    """f reads every attacked image as class 1; z_H is made up. TPR and FPR by hand."""
    lab = lab_of(tmp_path, "--images", 20)
    lab.splits["test"] = lab.splits["test"][0], lab.splits["test"][1][:20]
    x, y = lab.test_images(20)
    values = torch.randn(20, 10)
    z = {"clean": values, "adv": torch.randn(20, 10)}
    lab.made["linf0.3"] = SimpleNamespace(K=10), None
    monkeypatch.setattr(adv_detect, "attack_by_name", lambda lab, name, H, x, y, a: x + 2)
    lab.__dict__["f"] = "f"

    def logits(net, x):
        state = "adv" if x.max() > 1 else "clean"
        if net == "f":
            return F.one_hot(torch.ones(20, dtype=torch.long) if state == "adv" else y, 10).float()
        return z[state]
    monkeypatch.setattr(adv_detect, "logits", logits)
    rows = adv_detect.figure_3_2(lab)
    T = sorted((values[i, y[i]].item() for i in range(20)), reverse=True)[18]
    assert rows["T of TPR 0.95, integrated"] == pytest.approx(T) and rows["natural acc, integrated"] == 1
    by_hand = sum(z["adv"][i, 1].item() >= T and y[i] != 1 for i in range(20)) / 20
    assert rows["FPR at TPR 0.95, integrated, combined (3.35)"] == pytest.approx(by_hand)
    T = sorted(values.amax(1).tolist(), reverse=True)[18]
    by_hand = sum(z["adv"][i].max().item() >= T and z["adv"][i].argmax() != y[i] for i in range(20)) / 20
    assert rows["FPR at TPR 0.95, generative, detector (3.32)"] == pytest.approx(by_hand)
    assert rows["FPR at TPR 0.95, generative, strongest"] == rows["FPR at TPR 0.95, generative, joint"] == pytest.approx(by_hand)
    assert rows["misread, generative, detector (3.32)"] == pytest.approx((z["adv"].argmax(1) != y).float().mean().item())
    assert (lab.run.folder / "figure3.2.png").exists()


def test_attacks_by_name_ask_only_for_what_they_need_and_lower_their_loss(tmp_path, exact):
    lab = lab_of(tmp_path, "--chunk", 30)
    H, f = Detectors(small_nets(10)), common.make_net("mnist_cnn", 10, (1, 28, 28), 0.1).eval()
    x, y = lab.test_images(8)
    a, asked = Attack("inf", 0.2, 5, 0.1), []
    lab.__dict__["f"] = lambda x: asked.append("f") or f(x)

    class Asked:
        K = 10

        def __call__(self, x):
            asked.append("H")
            return H(x)
    for name, needs in (("classifier (3.30)", {"f"}), ("detector (3.32)", {"H"}), ("combined (3.34)", {"f", "H"}),
                        ("combined (3.35)", {"f", "H"})):
        asked.clear()
        x_adv = adv_detect.attack_by_name(lab, name, Asked(), x, y, a)
        assert set(asked) == needs and x_adv.shape == x.shape and (x_adv - x).abs().max() <= 0.2001
        if "3.35" not in name:                                                  # (its value jumps where it switches)
            with torch.no_grad():
                before, after = (adv_detect.ATTACKS[name](f(z), H(z), y) for z in (x, x_adv))
            assert (after < before).all(), name


def test_targets_and_seeds(tmp_path):
    lab = lab_of(tmp_path)
    H = Detectors(small_nets(10))
    lab.__dict__["robust"] = common.make_net("mnist_cnn", 10, (1, 28, 28), 0.1).eval()
    x = lab.test_images(4)[0].expand(10, 4, 1, 28, 28)
    found = adv_detect.targeted(lab, H, x, Attack("inf", 0.2, 3, 0.1))
    assert (H.each(found["generative"]) > H.each(x)).all()
    for k in range(10):
        assert (lab.robust(found["softmax"][k])[:, k] > lab.robust(x[k])[:, k]).all()
    seeds = adv_detect.class_gaussians(lab, 300)
    assert seeds.shape == (10, 300, 1, 28, 28) and seeds.min() >= 0 and seeds.max() <= 1
    for k in (0, 7):
        members = lab.images("train", lab.members["train", k, True])
        assert (seeds[k].mean(0) - members.mean(0)).abs().mean() < 0.07
        assert (seeds[k].mean(0) - members.mean(0)).abs().mean() < (seeds[k].mean(0) - lab.images(
            "train", lab.members["train", 1, True]).mean(0)).abs().mean() - 0.02
    lab.__dict__["f"] = lambda x: F.one_hot((x[:, 0, 0, 0] * 10).long(), 10).float()
    x = torch.zeros(10, 2, 1, 28, 28)
    x[3, 0, 0, 0, 0], x[4, 1, 0, 0, 0] = 0.35, 0.75
    right = adv_detect.reading(lab, x).view(10, 2)
    assert right[3].tolist() == [True, False] and right[0].all() and not right[4].any() and right.sum() == 3


# --- the script ---


def test_smoke_of_every_experiment(tmp_path, capsys):
    argv = ["--budget", "smoke", "--out", str(tmp_path), "--models", "linf0.3,l2-2.5", "--device", "cpu"]
    adv_detect.main([*argv, "--only", *adv_detect.EXPERIMENTS])
    results = json.loads((tmp_path / "adv_detect-glyphs" / "results.json").read_text())
    assert set(results) == set(adv_detect.EXPERIMENTS)
    for name, entry in results.items():
        numbers = [v for v in entry["ours"].values() if isinstance(v, (int, float))]
        assert numbers and all(map(math.isfinite, numbers)), name
    ours = results["table3.4"]["ours"]
    assert {key for key in ours if key.startswith("d_1 l2-2.5")} == {
        f"d_1 l2-2.5, attack {other}" for other in ("linf0.3", "linf0.5", "l2-2.5", "l2-5.0")}
    assert results["table3.1"]["ours"]["linf0.3: training attack"] == "2 x 0.5"
    for name in ("figure3.2", "figure3.3", "figure3.4", "figure3.5", "figure3.6"):
        assert (tmp_path / "adv_detect-glyphs" / f"{name}.png").stat().st_size > 5000
    capsys.readouterr()
    adv_detect.main([*argv, "--only", "table3.1"])
    assert "training linf" not in capsys.readouterr().out                       # checkpoints are used
    alone = json.loads((tmp_path / "adv_detect-glyphs" / "results.json").read_text())["table3.1"]["ours"]
    assert alone == results["table3.1"]["ours"]
    adv_detect.main([*argv, "--only", "figure3.6"])                             # the same without those before it
    alone = json.loads((tmp_path / "adv_detect-glyphs" / "results.json").read_text())["figure3.6"]["ours"]
    assert alone == results["figure3.6"]["ours"]


def test_smoke_on_colour(tmp_path, write_npz):
    folder = write_npz("cifar10", 240)
    adv_detect.main(["--budget", "smoke", "--dataset", "cifar10", "--data-dir", str(folder), "--out", str(tmp_path),
                     "--models", "linf8,l2-80", "--device", "cpu", "--only", "table3.1", "table3.7", "table3.9", "figure3.4"])
    results = json.loads((tmp_path / "adv_detect-cifar10" / "results.json").read_text())
    assert results["table3.7"]["published"]["d_1 linf8, 40 x 0.5"] == 0.9234
    assert {"d_1 linf8, attack linf2", "d_2 l2-80, attack l2-80"} <= set(results["table3.9"]["ours"])


def test_published_numbers_meet_ours(tmp_path, write_npz, monkeypatch):
    """At the source's settings the tables print every key that has a published number."""
    monkeypatch.setattr(adv_detect.Lab, "detectors", lambda self, model: None)
    monkeypatch.setattr(adv_detect.Lab, "auc", lambda self, H, a, ks, n, **how: ([0.5] * len(ks), n))
    folder = write_npz("cifar10", 240)
    for dataset, tables in (("mnist", ("table3.2", "table3.3", "table3.4", "table3.5")),
                            ("cifar10", ("table3.7", "table3.8", "table3.9", "table3.10"))):
        if dataset == "mnist":
            folder = write_npz("mnist", 240, 28, False)
        lab = lab_of(tmp_path, "--dataset", dataset, "--data-dir", folder, "--models", "all", "--train-steps", 0,
                     "--check-steps", 0, "--restarts", 50 if dataset == "mnist" else 10)
        for table in tables:
            e = adv_detect.EXPERIMENTS[table]
            assert e.published[dataset] and set(e.published[dataset]) <= set(e.function(lab)), table
    spot = {("table3.2", "d_2 l2-5.0, 2000 x 0.05"): .99918, ("table3.3", "d_1 linf0.5, 200 x 0.01"): .99820,
            ("table3.4", "d_1 l2-2.5, attack linf0.5"): .99339, ("table3.5", "d_1 l2-5.0, 50 random starts"): .99501,
            ("table3.6", "linf0.5: mean L2"): 5.65}
    for (table, key), value in spot.items():
        assert adv_detect.EXPERIMENTS[table].published["mnist"][key] == value
    assert len(adv_detect.EXPERIMENTS["table3.4"].published["mnist"]) == 32


def test_smallest_perturbations_are_judged_with_their_own_labels(tmp_path, monkeypatch):
    """Success: misread and above T. Made-up logits say which class an image is of; one detector is high."""
    lab = lab_of(tmp_path, "--pairs", 30, "--chunk", 2, "--images", 2000)
    x, y = lab.others(range(10), 3, apart=True)
    assert x.shape == (10, 3, 1, 28, 28) and not (y == torch.arange(10)[:, None]).any()
    flat = x.flatten(0, 1).flatten(1)
    assert len(flat.unique(dim=0)) == 30                                        # no image twice
    of, index = lab.splits["test"]
    known = {tuple(row.tolist()): int(label) for row, label in zip(of.take(index).flatten(1), of.y[index])}
    assert [known[tuple(row.tolist())] for row in flat] == y.flatten().tolist()
    judged = []

    def smallest(z, broken, x0, a, rounds, c_max):
        assert c_max == 8.0 and a.norm == "2" and a.eps == math.inf
        judged.append((x0, broken(x0)))
        return torch.where(judged[-1][1], 2.0, math.inf)
    monkeypatch.setattr(adv_detect, "smallest_perturbation", smallest)
    lab.made["linf0.3"] = SimpleNamespace(K=10, each=None), None
    truth = {tuple(row.tolist()): label for row, label in zip(flat, y.flatten().tolist())}

    def logits(net, x):
        """Clean test images: T is 1. Of the pairs: read as the class behind theirs if the label is even; some low."""
        if len(x) == 2000:                                                      # 0 of 100, 1 of 900, 5 of 1,000
            return torch.cat([torch.zeros(100, 10), torch.ones(900, 10), torch.full((1000, 10), 5.0)])
        labels = torch.tensor([truth[tuple(row.tolist())] for row in x.flatten(1)])
        z = F.one_hot((labels + (labels % 2 == 0)) % 10, 10) * torch.where(labels < 6, 3.0, 0.5)[:, None]
        return z - 1e-3
    monkeypatch.setattr(adv_detect, "logits", logits)
    rows = adv_detect.table_3_6(lab)
    expected = ((y % 2 == 0) & (y < 6)).float().mean().item()                   # read wrongly, and above T = 1
    assert rows["n"] == 30 and rows["linf0.3: T of TPR .95"] == 1.0
    assert rows["linf0.3: FPR"] == pytest.approx(expected) and 0 < expected < 1 and rows["linf0.3: mean L2"] == 2.0
    assert len(judged) == 2


def test_untuned_reports_what_the_tuned_attacks_missed(tmp_path, monkeypatch):
    lab = lab_of(tmp_path)
    lab.__dict__["f"], made_up = None, iter([[.97, .99], [.98, .98], [.96, .97], [.95, .99], [.99, .90], [.99, .99]])
    monkeypatch.setattr(adv_detect.Lab, "detectors", lambda self, model: None)
    monkeypatch.setattr(adv_detect.Lab, "auc", lambda self, H, a, ks, n, **how: (next(made_up), n))
    rows = adv_detect.untuned(lab)
    assert rows["d_1 linf0.3, APGD"] == 0.95 and rows["d_2 linf0.3, random search"] == 0.90
    assert rows["d_1 linf0.3, untuned below tuned by"] == pytest.approx(0.02)
    assert rows["d_2 linf0.3, untuned below tuned by"] == pytest.approx(0.08)


@pytest.mark.parametrize("argv, says", [
    (["--models", "linf0.4"], "linf0.4"), (["--only", "table3.8", "--models", "linf0.3"], "norm 2"),
    (["--only", "figure3.2", "--models", "l2-2.5"], "norm inf"), (["--only", "table3.12"], "table3.12"),
    (["--batch", "0"], "batch"), (["--net", "lenet"], "lenet"), (["--net", "unet"], "unet"), (["--width", "0.001"], "width"),
    (["--images", "-3"], "-3"), (["--augment", "rotate"], "crop_flip"), (["--finetune", "2"], "finetune")])
def test_bad_input_ends_in_one_line(outcome, tmp_path, argv, says):
    code, err = outcome(adv_detect, *argv, "--budget", "smoke", "--out", tmp_path / "out")
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1


def test_other_settings_than_the_checkpoint_s_are_refused(outcome, tmp_path):
    argv = ["--budget", "smoke", "--out", tmp_path, "--only", "table3.1", "--device", "cpu"]
    assert outcome(adv_detect, *argv)[0] == 0
    code, err = outcome(adv_detect, *argv, "--lr", "0.01")
    assert code == 2 and "lr 0.0005 (now 0.01)" in err
    assert outcome(adv_detect, *argv, "--images", "14")[0] == 0                 # evaluation may change
    argv[argv.index("table3.1")] = "figure3.2"
    assert outcome(adv_detect, *argv)[0] == 0
    results = tmp_path / "adv_detect-glyphs" / "results.json"
    before = results.read_text()
    code, err = outcome(adv_detect, *argv[:-2], "table3.2", "figure3.2", "--f-iters", "5", "--device", "cpu")
    assert code == 2 and "iterations 3 (now 5)" in err and results.read_text() == before  # said before table3.2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_detectors_on_a_gpu_are_those_of_the_cpu():
    H, x = Detectors(small_nets(4)), torch.rand(4, 3, 1, 28, 28)
    assert torch.allclose(H.each(x), copy.deepcopy(H).cuda().each(x.cuda()).cpu(), atol=1e-3)
