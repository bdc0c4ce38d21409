"""adv_detect.py: joined detectors, losses by hand, attacks, one update by hand, what tables and figures ask for."""
import copy
import inspect
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adv_detect as ad
import common
from adv_detect import Detectors, Model, Steps, logit_loss, minimise, rows_of, together
from common import Training
from conftest import Killed


def run_of(tmp_path, *flags, name="runs"):
    argv = ["--budget", "smoke", "--out", str(tmp_path / name), "--device", "cpu", *map(str, flags)]
    args = ad.get_args(argv)
    return common.Run("adv_detect", args), args.settings


def small_nets(K, shape=(1, 28, 28)):
    nets = [ad.network(1, shape, 0.1, "cpu") for _ in range(K)]
    for net in nets:
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
    return nets


def some_images(n, classes=10, shape=(1, 28, 28)):
    return common.Images(torch.randint(0, 256, (n, *shape), dtype=torch.uint8), torch.arange(n) % classes, "made up")


def model_of(H, check=Steps("inf", 0.2, 2, 0.1)):
    return Model(H, H, torch.zeros(H.K), check)


class Linear(nn.Module):
    """z_k(x) = <w_k, x>: in place of Detectors."""

    def __init__(self, K, shape):
        super().__init__()
        self.K, self.w = K, nn.Parameter(torch.randn(K, *shape))

    def forward(self, x):
        if x.dim() == 4:
            return (self.w * x[:, None]).sum((-3, -2, -1))
        return (self.w[:, None] * x).sum((-3, -2, -1))


# --- K networks as one ---


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_detectors_side_by_side_are_the_detectors(shape):
    nets, x = small_nets(3, shape), torch.rand(3, 4, *shape)
    H = Detectors(nets)
    alone = torch.stack([net(images)[:, 0] for net, images in zip(nets, x)])
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    assert torch.allclose(H(x), alone, atol=1e-4, rtol=1e-3)
    assert torch.allclose(H(x[1]), torch.cat([net(x[1]) for net in nets], 1), atol=1e-4, rtol=1e-3)
    pair = ad.first_two(model_of(H))
    assert pair.H.K == 2 and torch.allclose(pair.H(x[:2]), alone[:2], atol=1e-4, rtol=1e-3)
    assert torch.allclose(pair.fast(x[:2]), alone[:2], atol=0.05, rtol=0.05)


def test_detectors_do_not_see_each_other_s_images():
    H, x = Detectors(small_nets(3)), torch.rand(3, 2, 1, 28, 28, requires_grad=True)
    gradient, = torch.autograd.grad(H(x)[1].sum(), x)
    assert gradient[1].abs().sum() > 0 and gradient[[0, 2]].abs().sum() == 0


def test_published_sizes_and_table_3_1():
    with torch.device("meta"):
        for outputs, size in ((1, 3_265_409), (10, 3_274_634)):
            assert sum(p.numel() for p in ad.network(outputs, (1, 28, 28), 1.0, "meta").parameters()) == size
    assert ad.MODELS[1]["linf0.5"] == ("inf", 0.5, 100, 0.01, True) and ad.MODELS[1]["l2-5.0"] == ("2", 5.0, 200, 0.1, True)
    assert ad.MODELS[1]["linf0.3"].within(200) == ("inf", 0.3, 200, 0.01, True)     # evaluation: the same step
    a = ad.MODELS[3]["linf8"]
    assert (a.norm, a.eps * 255, a.steps, a.step * 255, a.adam) == ("inf", 8, 40, 0.5, False)


def test_published_attacks():
    """Tab. 3.1, sec. 3.2.3, Tab. 3.10, the captions of figures; CIFAR-10 in pixels from 0 to 255."""
    assert {name: tuple(a) for name, a in ad.MODELS[1].items()} == {
        "linf0.3": ("inf", 0.3, 100, 0.01, True), "linf0.5": ("inf", 0.5, 100, 0.01, True),
        "l2-2.5": ("2", 2.5, 100, 0.1, True), "l2-5.0": ("2", 5.0, 200, 0.1, True)}
    assert {name: tuple(a) for name, a in ad.OTHERS[1].items()} == {
        "figure3.2": ("inf", 0.3, 100, 0.1, True), "figure3.3": ("inf", 0.4, 100, 0.01, True),
        "figure3.6": ("2", 15, 60, 0.25, False), "table3.6": ("2", 1000, 500, 0.1, True), "robust": ("inf", 0.3, 40, 0.01, False)}

    def pixels(attacks):
        return {name: (a.norm, round(a.eps * 255, 6), a.steps, round(a.step * 255, 6), a.adam) for name, a in attacks.items()}
    assert pixels(ad.MODELS[3]) == {
        "linf8": ("inf", 8, 40, 0.5, False), "l2-80": ("2", 80, 20, 10, False), "linf2": ("inf", 2, 10, 0.5, False)}
    assert pixels(ad.OTHERS[3]) == {
        "figure3.2": ("inf", 8, 20, 2, False), "figure3.3": ("inf", 12, 30, 2, False), "figure3.6": ("2", 7650, 60, 127.5, False),
        "table3.6": ("2", 255_000, 100, 25.6, False), "robust": ("inf", 8, 7, 2, False)}
    colour = ad.network(10, (3, 32, 32), 1.0, "meta")
    assert len([part for part in colour.modules() if isinstance(part, nn.Conv2d) and part.kernel_size == (3, 3)]) == 31


def test_fewer_steps_are_longer_in_l_inf():
    assert Steps("inf", 0.5, 100, 0.01).within(20) == Steps("inf", 0.5, 20, 0.05)
    assert Steps("2", 5.0, 200, 0.1).within(20) == Steps("2", 5.0, 20, 0.1)
    assert Steps("inf", 0.5, 100, 0.01).within(0) == Steps("inf", 0.5, 100, 0.01)


# --- losses: a hand-made example of three classes ---


Z_F = torch.tensor([[2.0, 0.5, -1.0], [0.2, 0.1, 3.0], [-1.0, -2.0, -0.5]])     # right; fooled; fooled
Z_H = torch.tensor([[5.0, -4.0, -3.0], [6.0, -7.0, -2.0], [4.0, 0.5, 3.0]])
Y = torch.tensor([0, 0, 1])


def by_hand(loss, z_f=Z_F, z_H=Z_H, y=Y):
    return loss(None, lambda x: z_f, lambda x: z_H, y)


def test_losses_by_hand():
    assert by_hand(ad.classifier_loss).tolist() == pytest.approx([1.5, -2.8, -1.5])
    assert by_hand(ad.detector_loss).tolist() == pytest.approx([3.0, 2.0, -4.0])
    # class K + 1: (1 + 3) 2 = 8, (1 + 2) 3 = 9, (1 - 4) (-.5) = 1.5; against own logits 2, .2, -2
    assert by_hand(ad.combined_loss).tolist() == pytest.approx([8 - 0.5, 9 - 3.0, 1.5 + 0.5])
    sure = torch.full((1, 3), 9.0)                                              # accepted: the K + 1st is below the own logit
    assert by_hand(ad.combined_loss, torch.tensor([[2.0, 1.5, -1.0]]), sure, Y[:1]).item() == pytest.approx(0.5)
    assert by_hand(ad.combined_loss, torch.tensor([[1.0, 4.0, -1.0]]), sure, Y[:1]).item() == pytest.approx(-3.0)  # not flat
    assert by_hand(ad.switching_loss).tolist() == pytest.approx([1.5, 2.0, -4.0])
    # joint: min of margins over y (-1.5, -3; -.1, 2.8; 1, 1.5) and of z_H (-4, -3; -7, -2; 4, 3), the larger of two
    assert by_hand(ad.joint_loss).tolist() == pytest.approx([3.0, 2.0, -1.5])
    *ours, entropy, margin = ad.LOSSES.values()
    assert ours == [ad.classifier_loss, ad.detector_loss, ad.combined_loss, ad.switching_loss, ad.joint_loss]
    assert by_hand(margin).tolist() == pytest.approx([8.0, 8.0, -3.5])
    x = torch.zeros(3, 1, 1, 1)
    own = entropy(x, None, lambda x: Z_H, Y)
    assert torch.allclose(own, Z_H.log_softmax(1)[[0, 1, 2], Y])                # low: far from the label


def test_gradients_of_combined_losses():
    """Where (3.35) has switched it goes by the detector alone, and the switch carries no gradient; (3.34) by hand."""
    z_f, z_H = Z_F.clone().requires_grad_(True), Z_H.clone().requires_grad_(True)
    by_hand(ad.switching_loss, z_f, z_H).sum().backward()
    assert z_f.grad.tolist() == [[1, -1, 0], [0, 0, 0], [0, 0, 0]]
    assert z_H.grad.tolist() == [[0, 0, 0], [0, 0, -1], [-1, 0, 0]]
    tied = torch.tensor([[1.0, 1.0, 0.0]])                                      # not fooled yet
    assert by_hand(ad.switching_loss, tied, Z_H[:1], Y[:1]).item() == 0.0
    z_f, z_H = Z_F[:1].clone().requires_grad_(True), Z_H[:1].clone().requires_grad_(True)
    by_hand(ad.combined_loss, z_f, z_H, Y[:1]).sum().backward()                 # (1 - z_H,3) z_f,1 - z_f,2
    assert z_f.grad.tolist() == [[4, -1, 0]] and z_H.grad.tolist() == [[0, 0, -2]]


def test_losses_of_one_network(exact):
    H, x = Linear(2, (1, 3, 3)), torch.rand(2, 4, 1, 3, 3)
    assert torch.equal(logit_loss(x, H), -H(x))
    c, x0 = torch.rand(2, 4), torch.rand(2, 4, 1, 3, 3)
    assert torch.allclose(ad.near_loss(x, H, x0, c), c * (x - x0).flatten(2).norm(dim=2) ** 2 - H(x), atol=1e-5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 5))
    assert torch.allclose(ad.softmax_loss(x, net), -torch.stack([net(x[0])[:, 0], net(x[1])[:, 1]]))
    y = torch.tensor([0, 1, 2, 3])
    assert torch.allclose(ad.label_loss(x[0], net, y), net(x[0]).log_softmax(1)[torch.arange(4), y])


# --- attacks ---


def test_adam_is_adam_and_fresh_in_every_call(exact):
    x0, target = torch.rand(2, 3, 1, 4, 4), torch.rand(1, 4, 4)
    a = Steps("inf", 0.1, 7, 0.02)

    def loss(x, target):
        return ((x - target).square() * torch.arange(1, 5)).sum((-3, -2, -1))
    delta = nn.Parameter(torch.zeros_like(x0))
    optimizer = torch.optim.Adam([delta], lr=0.02)
    for _ in range(7):
        optimizer.zero_grad()
        loss(x0 + delta, target).sum().backward()
        optimizer.step()
        with torch.no_grad():
            delta.copy_(((x0 + delta).clamp(0, 1) - x0).clamp(-0.1, 0.1))
    once = minimise(loss, x0, a, x0, target)
    assert torch.allclose(once, x0 + delta, atol=1e-5) and (once - x0).abs().max() > 0.05
    assert torch.equal(minimise(loss, x0, a, x0, target), once)                 # nothing is left of the first call


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("attack", ["adam", "plain"])
def test_attacks_climb_inside_the_ball_and_the_box(norm, attack):
    H, x0 = Detectors(small_nets(2)), torch.rand(2, 3, 1, 28, 28)
    x0[0, 0] = 0.5
    eps, step = {"inf": (0.1, 0.03), "2": (1.5, 0.4)}[norm]
    x = minimise(logit_loss, x0, Steps(norm, eps, 6, step, attack == "adam"), x0, H)
    size = (x - x0).abs().amax((2, 3, 4)) if norm == "inf" else (x - x0).flatten(2).norm(dim=2)
    assert x.min() >= 0 and x.max() <= 1 and size.max() <= eps * 1.0001 and size.min() > eps / 2
    assert (H(x) > H(x0)).all() and all(p.grad is None for p in H.parameters())


def test_steps_by_hand(exact):
    x0 = torch.full((1, 1, 1, 2), 0.5)

    def slope(x):
        return (x * torch.tensor([[[[3.0, -4.0]]]])).sum((-3, -2, -1))

    def go(*a, x0=x0):
        return minimise(slope, x0, Steps(*a), x0).flatten().tolist()
    assert go("2", 9.0, 1, 0.1, False) == pytest.approx([0.5 - 0.06, 0.5 + 0.08])
    assert go("inf", 9.0, 1, 0.1, False) == pytest.approx([0.4, 0.6])
    assert go("inf", 0.15, 2, 0.1, False) == pytest.approx([0.35, 0.65])
    assert go("2", 0.05, 3, 0.1, False) == pytest.approx([0.5 - 0.03, 0.5 + 0.04])
    corner = torch.tensor([[[[0.0, 0.5]]]])                                     # the box takes the first pixel's part away
    assert go("2", 0.05, 1, 0.1, False, x0=corner) == pytest.approx([0.0, 0.55])
    assert torch.equal(minimise(lambda x: 0 * x.sum((-3, -2, -1)), x0, Steps("2", 1.0, 2, 0.1, False), x0), x0)
    start = minimise(slope, x0, Steps("inf", 0.3, 1, 0.0, False), x0 + 0.2)     # it starts there, not at the image
    assert torch.allclose(start, x0 + 0.2)
    for outside in (x0 + 1, x0 - 1):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            minimise(slope, outside, Steps("2", 1.0, 1, 0.1), outside)


def test_random_starts():
    x0 = torch.full((1, 4000, 1, 4, 4), 0.95)
    cube = ad.scattered(x0, Steps("inf", 0.3, 1, 1)) - x0
    assert cube.abs().max() <= 0.3001 and cube.std() == pytest.approx(0.6 / math.sqrt(12), rel=0.02)
    assert (x0 + cube).max() > 1.2                                              # not clipped to the box
    moved = (ad.scattered(x0, Steps("2", 2.0, 1, 1)) - x0).flatten(2)
    assert torch.allclose(moved.norm(dim=2).flatten().sort().values, torch.linspace(0, 2, 4000), atol=0.06)
    assert moved.mean().abs() < 0.02


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

    def down(x, net):
        return -net(x)[:, 0]
    theirs = torchattacks.PGD(both, eps=0.1, alpha=0.03, steps=8, random_start=False)(x, y)
    assert (minimise(down, x, Steps("inf", 0.1, 8, 0.03, False), x, net) - theirs).abs().max() < 1e-4
    for norm, eps, step in (("inf", 0.1, 0.01), ("2", 1.5, 0.1)):                # what no part of training has seen: Auto-PGD
        attack = torchattacks.APGD(both, norm="L" + norm, eps=eps, steps=30, n_restarts=1, loss="ce", seed=0)
        with torch.no_grad():
            start, reached = (net(z)[:, 0] for z in (x, attack(x, y)))
        found = ad.judged(lambda z: net(z)[:, 0], down, x, Steps(norm, eps, 60, step, False), x, net).amax(-1).detach()
        tried = reached > start                                                 # (theirs stops where y is lost)
        assert tried.sum() >= 4 and (found - start)[tried].mean() > 0.95 * (reached - start)[tried].mean()


@pytest.mark.parametrize("adam", [True, False])
def test_every_image_on_the_way_is_judged(exact, adam):
    """The first is the start, cut into ball and box; the others are minimise()'s after 1, 2, ... steps."""
    x0, target = torch.rand(2, 3, 1, 4, 4), torch.rand(1, 4, 4)
    start = x0 + 0.5

    def loss(x, target):
        return (x - target).square().sum((-3, -2, -1))

    a = Steps("inf", 0.2, 4, 0.15, adam)
    seen = ad.judged(lambda x: x.sum((-3, -2, -1)), loss, x0, a, start, target)
    assert seen.shape == (2, 3, 5)
    assert torch.allclose(seen[..., 0], (x0 + 0.2).clamp(max=1).sum((-3, -2, -1)))
    for t in range(1, 5):
        assert torch.allclose(seen[..., t], minimise(loss, x0, a._replace(steps=t), start, target).sum((-3, -2, -1)))
    pairs = ad.judged(lambda x: x.flatten(1)[:, :2], lambda x: x.sum((-3, -2, -1)), x0[0], a, x0[0])
    assert pairs.shape == (3, 2, 5) and torch.equal(pairs[..., 0], x0[0].flatten(1)[:, :2])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        ad.judged(loss, loss, x0 + 1, a, x0, target)


# --- images of each class, and of the others ---


def test_lists_of_images_and_batches():
    images = some_images(60)
    own, others = rows_of(images, True), rows_of(images, False)
    for k in range(10):
        assert (images.y[own[k]] == k).all() and (images.y[others[k]] != k).all()
        assert len(own[k]) + len(others[k]) == 60
    x, y = together(images, others, 7)
    assert x.shape == (10, 7, 1, 28, 28) and torch.equal(x[3, 2], images.take([int(others[3][2])])[0])
    assert torch.equal(y, torch.stack([images.y[row[:7]] for row in others]))
    assert together(images, own, 100)[0].shape[1] == 6
    known = {row.numpy().tobytes(): int(y) for row, y in zip(images.x, images.y)}
    for rows, inside in ((own, True), (others, False)):
        x = ad.draw(images, rows, 5, 0, 3)
        for k in range(10):
            for image in x[k]:
                assert (known[(image * 255).round().byte().numpy().tobytes()] == k) == inside
        assert torch.equal(x, ad.draw(images, rows, 5, 0, 3)) and not torch.equal(x, ad.draw(images, rows, 5, 0, 4))
    x = torch.cat([ad.draw(images, own, 3, 0, t) for t in (0, 1)], 1)
    assert len(x[0].flatten(1).unique(dim=0)) == 6                              # shuffled passes: every image once
    colour = some_images(60, shape=(3, 8, 8))
    x = ad.draw(colour, rows_of(colour, True), 4, 0, 0)
    assert x.shape == (10, 4, 3, 8, 8) and (x == 0).float().mean() > 0.02       # padded, cropped
    one = common.Images(colour.x[:1].expand(60, -1, -1, -1), colour.y, "one image")
    crops = [ad.draw(one, rows_of(one, True), 4, 0, t) for t in range(3)]
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[1], crops[2])  # other places in each batch
    plain, seen = one.take([0])[0], {True: 0, False: 0}
    for x in torch.cat(crops).flatten(0, 1):
        for way, image in ((False, x), (True, x.flip(-1))):
            where = F.conv2d(F.pad(plain, (2, 2, 2, 2))[None], image[None])     # largest where the image itself stands
            seen[way] += bool((where - image.square().sum()).abs().min() < 1e-3)
    assert min(seen.values()) > 20                                              # half of them are mirrored


def test_functions_by_parts():
    x, y = torch.rand(3, 7, 1, 2, 2), torch.rand(3, 7)
    sizes = []

    def function(x, y):
        sizes.append(x.shape[1])
        return x.sum((-3, -2, -1)) + y
    assert torch.allclose(ad.by_images(function, 3, x, y), x.sum((-3, -2, -1)) + y) and sizes == [3, 3, 1]
    assert torch.equal(ad.by_images(lambda x: x[:, 0, 0], 2, x[0]), x[0][:, 0, 0])


# --- training ---


def train(run, s, a=Steps("inf", 0.3, 2, 0.1), check=Steps("inf", 0.25, 3, 0.1), K=3, f=None, images=None, name="m"):
    images = images or some_images(60, K)
    shape = images.shape
    held = ad.chosen(images, torch.arange(12))
    left = ad.chosen(images, torch.arange(12, 60))
    return ad.train_detectors(run, s, name, a, check, lambda n: ad.network(n, shape, 0.1, "cpu"), f, left, held)


def test_an_update_by_hand_is_that_of_each_detector_alone(exact, tmp_path, monkeypatch):
    """Eq. 3.23: batches of the training split, the model's attack from a random start on the weights of now, then a
    step down the losses' sum. SGD in Adam's place: Adam would hide a factor."""
    run, s = run_of(tmp_path, "--updates", 2, "--batch", 4, "--seed", 3)
    images, asked = some_images(60, 3), []

    def attack(loss, x0, a, start, net):
        asked.append((loss, x0, a, start, copy.deepcopy(net)))
        return (x0 + 0.3).clamp(0, 1)
    monkeypatch.setattr(ad, "minimise", attack)
    monkeypatch.setattr(ad, "attacked_scores", lambda run, model, *_: (torch.ones(3, 2), torch.zeros(3, 2)))
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, fused: torch.optim.SGD(p, 2000 * lr))
    model = train(run, s, images=images)
    torch.manual_seed(3)
    nets = [ad.network(1, (1, 28, 28), 0.1, "cpu") for _ in range(3)]
    left = ad.chosen(images, torch.arange(12, 60))
    for t in range(2):
        x_pos = ad.draw(left, rows_of(left, True), 4, 53, t)
        x_neg = ad.draw(left, rows_of(left, False), 4, 3, t)
        loss, x0, a, start, climbed = asked[t]
        assert loss is logit_loss and torch.equal(x0, x_neg) and a == Steps("inf", 0.3, 2, 0.1)
        assert 0.25 < (start - x0).abs().max() <= 0.3001                        # the model's eps
        for k, net in enumerate(nets):
            assert torch.allclose(climbed(x_neg)[k], net(x_neg[k])[:, 0], atol=1e-4)
            z_pos, z_neg = net(x_pos[k])[:, 0], net((x_neg[k] + 0.3).clamp(0, 1))[:, 0]
            loss = (F.softplus(-z_pos).sum() + F.softplus(z_neg).sum()) / 8
            gradients = torch.autograd.grad(loss, net.parameters())
            with torch.no_grad():
                for p, g in zip(net.parameters(), gradients):
                    p -= 2000 * 5e-4 * g
    x = torch.rand(3, 5, 1, 28, 28)
    after = torch.stack([net(z)[:, 0] for net, z in zip(nets, x)])
    assert torch.allclose(model.H(x), after, atol=1e-3)
    assert (after - asked[0][-1](x)).abs().amin(1).min() > 0.01                  # it moved, every detector
    assert torch.allclose(model.fast(x), model.H(x), atol=1e-4)


def test_training_tells_the_two_kinds_apart(tmp_path):
    """Class 0 is dark: its detector's logits of clean and of attacked images part, and the loss falls."""
    run, s = run_of(tmp_path, "--updates", 40, "--batch", 8, "--val-images", 3)
    images = some_images(60, 2)
    images.x[images.y == 0] //= 8
    train(run, s, Steps("inf", 0.05, 2, 0.03), Steps("inf", 0.05, 2, 0.03), 2, images=images)
    rows = (tmp_path / "runs" / "adv_detect-glyphs" / "log-m.csv").read_text().splitlines()
    first, last = (dict(zip(rows[0].split(","), map(float, row.split(",")))) for row in (rows[1], rows[-1]))
    assert last["loss"] < 0.7 * first["loss"] and last["z_pos"] > 0.5 > -0.5 > last["z_neg"]


def test_each_detector_keeps_the_weights_of_its_own_best_validation(tmp_path, monkeypatch):
    run, s = run_of(tmp_path, "--updates", 15, "--val-images", 4)
    made_up = [[0.6, 0.5, 0.1], [0.5, 0.7, 0.1], [0.4, 0.6, 0.2], [0.4, 0.7, 0.2], [0.1, 0.1, 0.1]]
    after = []

    def scores(run, model, images, attacks, n):
        assert len(images) == 12 and n == 4 and attacks == [Steps("inf", 0.25, 3, 0.1)]
        assert torch.allclose(model.fast(images.take([0])), model.H(images.take([0])), atol=0.02)
        after.append(copy.deepcopy(model.H))
        wanted = torch.tensor(made_up[len(after) - 1])
        ranks = torch.arange(10).expand(3, 10) / 10 + 0.05                      # AUC of one image at r: r
        return wanted[:, None], ranks
    monkeypatch.setattr(ad, "attacked_scores", scores)
    model = train(run, s)
    assert len(after) == 5                                                      # after 3, 6, ..., 15
    assert model.auc.tolist() == pytest.approx([0.6, 0.7, 0.2], abs=0.051)
    for k, when in ((0, 0), (1, 3), (2, 3)):                                    # of equals the later one
        parts = [H.nets[k].state_dict() for H in (model.H, *after)]
        assert [all(torch.equal(parts[0][key], part[key]) for key in part) for part in parts[1:]] == [
            i == when for i in range(5)]
    assert model.check == Steps("inf", 0.25, 3, 0.1)
    x = torch.rand(3, 2, 1, 28, 28)
    assert torch.allclose(model.fast(x), model.H(x), atol=0.02)


def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(Training, "SAVE_SECONDS", -1)
    images = some_images(60, 3)
    flags = ("--updates", 5, "--val-images", 3)
    whole = train(*run_of(tmp_path, *flags, name="whole"), images=images)
    step, calls = torch.optim.Adam.step, []

    def dying(self, *args, **options):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return step(self, *args, **options)
    monkeypatch.setattr(torch.optim.Adam, "step", dying)
    with pytest.raises(Killed):
        train(*run_of(tmp_path, *flags, name="broken"), images=images)
    torch.manual_seed(99)
    again = train(*run_of(tmp_path, *flags, name="broken"), images=images)
    assert len(calls) == 6 and torch.equal(again.auc, whole.auc)
    assert all(torch.equal(a, b) for a, b in zip(again.H.parameters(), whole.H.parameters()))
    with pytest.raises(common.UserError, match="attacks"):
        train(*run_of(tmp_path, *flags, name="broken"), a=Steps("inf", 0.2, 2, 0.1), images=images)


def test_fine_tuning_starts_as_the_classifier_and_leaves_batchnorm_s_statistics(tmp_path, monkeypatch, exact):
    run, s = run_of(tmp_path, "--updates", 1)
    f, seen = ad.network(3, (3, 16, 16), 0.1, "cpu"), []
    for m in f.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(std=0.3)
    sgd, x = torch.optim.SGD, torch.rand(4, 3, 16, 16)

    def optimizer(parameters, lr, **options):
        seen.append((lr, options))
        return sgd(parameters, lr, **options)

    def scores(run, model, *_):
        seen.append(model.H)
        return torch.ones(3, 2), torch.zeros(3, 2)

    def attack(loss, x0, a, start, net):
        seen.append(net(x))
        return x0
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    monkeypatch.setattr(ad, "minimise", attack)
    monkeypatch.setattr(ad, "attacked_scores", scores)
    model = train(run, s, K=3, f=f, images=some_images(60, 3, (3, 16, 16)))
    assert seen[0] == (1e-3, {"momentum": 0.9, "weight_decay": 2e-4})
    assert torch.allclose(seen[1], f(x), atol=1e-4) and f(x).std() > 1e-3       # before the first update
    norms = [m for m in model.H.modules() if isinstance(m, nn.BatchNorm2d)]
    its = [m for m in f.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms and not any(m.training for m in norms)
    for mine, old in zip(norms, 3 * its, strict=True):
        assert torch.equal(mine.running_mean, old.running_mean)
    for own, rows in ((net.head.weight, f.head.weight[k : k + 1]) for k, net in enumerate(model.H.nets)):
        assert own.data_ptr() != rows.data_ptr()  # f stays as it was
    assert not torch.equal(model.H(x), seen[1])


def test_the_softmax_baseline_s_attack(exact):
    net, x = ad.network(10, (1, 28, 28), 0.1, "cpu").train(), torch.rand(20, 1, 28, 28)
    y = torch.arange(20) % 10
    attacked = ad.against(net, x, y, Steps("inf", 0.1, 3, 0.05, False))
    assert net.training and 0.05 < (attacked - x).abs().max() <= 0.1001
    assert F.cross_entropy(net(attacked), y) > F.cross_entropy(net(x), y) + 0.01
    assert not torch.equal(attacked, ad.against(net, x, y, Steps("inf", 0.1, 3, 0.05, False)))     # random start
    modes = []
    net.register_forward_hook(lambda net, *_: modes.append(net.training))
    ad.against(net, x, y, Steps("inf", 0.1, 3, 0.05, False))
    assert modes and not any(modes) and net.training


# --- metrics ---


def test_auroc_is_scikit_learn_s():
    metrics = pytest.importorskip("sklearn.metrics")
    positive, negative = torch.randn(40).round(decimals=1) + 0.5, torch.randn(60).round(decimals=1)
    truth = torch.cat([torch.ones(40), torch.zeros(60)])
    assert len(set(positive.tolist()) & set(negative.tolist())) > 3             # ties
    assert ad.auroc(positive, negative) == pytest.approx(metrics.roc_auc_score(truth, torch.cat([positive, negative])))


def test_threshold_by_brute_force():
    z = torch.randn(30).round(decimals=1)
    for share in (0.5, 0.9, 0.95, 1.0):
        best = max(t for t in z.tolist() if sum(v >= t for v in z.tolist()) / 30 >= share)
        assert ad.threshold(z, share) == pytest.approx(best)


def test_both_ways_of_detection():
    z_H = torch.tensor([[1.0, 4.0, 2.0], [3.0, 0.0, -1.0]])
    z_f = torch.tensor([[0.0, 0.0, 9.0], [9.0, 0.0, 0.0]])
    y = torch.tensor([1, 0])
    z, misread = ad.detect(z_f, z_H, y)
    assert z.tolist() == [2, 3] and misread.tolist() == [True, False]
    z, misread = ad.detect(z_H, z_H, y)
    assert z.tolist() == [4, 3] and misread.tolist() == [False, False]


def test_scores_of_clean_and_attacked_images(tmp_path, monkeypatch):
    """Clean: all of the class; attacked: the first others. The attack climbs the fast copy; H judges every image on its
    way, from every start, under every attack, and the largest logit counts."""
    run, _ = run_of(tmp_path, "--chunk", 4)
    H, images, handed = Detectors(small_nets(2)), some_images(40, 4), []
    climbed = Detectors(small_nets(2))
    model = Model(H, climbed, None, None)
    a, b = Steps("inf", 0.2, 1, 0.1), Steps("inf", 0.1, 2, 0.1, False)
    real, way = ad.judged, []

    def watched(judge, loss, x0, a, start, net):
        assert net is climbed and loss is logit_loss
        handed.append((x0, start, a))
        way.append(real(judge, loss, x0, a, start, net))
        assert torch.allclose(judge(x0), H(x0), atol=1e-4)
        return way[-1]
    monkeypatch.setattr(ad, "judged", watched)
    clean, attacked = ad.attacked_scores(run, model, images, [a], 7)
    assert [x.shape[1] for x, *_ in handed] == [3, 3, 1] and all(x is start for x, start, _ in handed)
    assert torch.equal(attacked, torch.cat(way, 1).amax(-1))
    for k in (0, 1):
        others = images.take(rows_of(images, False)[k][:7])
        assert torch.equal(torch.cat([x[k] for x, *_ in handed]), others)
        assert torch.allclose(torch.cat(way, 1)[k, :, 0], H(others)[:, k], atol=1e-4)
        assert torch.allclose(clean[k], H(images.take(rows_of(images, True)[k]))[:, k], atol=1e-4)
        assert clean.shape == (2, 10)
    handed.clear(), way.clear()
    _, several = ad.attacked_scores(run, model, images, [a, b], 7, starts=4)
    assert [it for *_, it in handed] == 3 * (4 * [a] + 4 * [b])
    assert torch.equal(several[:, :3], torch.stack([z.amax(-1) for z in way[:8]]).amax(0))
    assert len({start.sum().item() for _, start, _ in handed[:8]}) == 8         # all from different starts
    assert all(0 < (start - x).abs().max() <= it.eps + 1e-4 for x, start, it in handed)


def test_the_interval_of_an_fpr_redraws_clean_images_too():
    torch.manual_seed(1)
    clean, attacked = torch.randn(300) + 2, torch.cat([torch.randn(150), torch.full((50,), -math.inf)])
    row = ad.fpr_row("A", clean, attacked, 0.9)
    T = ad.threshold(clean, 0.9)
    assert row["quantity"] == "FPR, A" and row["tpr"] == 0.9 and row["n"] == 200
    assert row["value"] == pytest.approx((attacked >= T).float().mean().item()) and row["value"] > 0.03
    wilson = common.rate("", attacked >= T)["interval"]
    assert row["interval"][0] <= wilson[0] and row["interval"][1] >= wilson[1]
    assert row["interval"][1] - row["interval"][0] > 1.1 * (wilson[1] - wilson[0])          # T of 300 images varies, too
    assert ad.fpr_row("A", clean, attacked - 99, 0.9)["interval"] == common.rate("", attacked > 99)["interval"]


def test_bisection_finds_the_distance_to_a_linear_boundary(exact):
    torch.manual_seed(3)
    H = Linear(2, (1, 3, 3))
    H.w.data = 0.3 * F.normalize(H.w.data.flatten(1) - H.w.data.flatten(1).mean(1, keepdim=True)).view_as(H.w)
    x0 = 0.5 + 0.02 * torch.randn(2, 4, 1, 3, 3)
    y = torch.tensor([[1] * 4, [0] * 4])                                        # detector k wants class k
    T = (H(x0).amax() + 0.03).item()
    found = ad.smallest_perturbation(model_of(H), T, Steps("2", 1000, 100, 0.02), 100.0, x0, y)
    distance = ((T - H(x0)) / 0.3).detach()
    reached = found.isfinite()
    assert reached.float().mean() > 0.7
    assert (found >= distance - 1e-4)[reached].all() and (found < 1.25 * distance + 0.02)[reached].all()
    assert ad.smallest_perturbation(model_of(H), 1e6, Steps("2", 1000, 5, 0.1), 8.0, x0, y).isinf().all()
    own = torch.tensor([[0] * 4, [1] * 4])                                      # accepted, but rightly read
    assert ad.smallest_perturbation(model_of(H), T, Steps("2", 1000, 30, 0.05), 8.0, x0, own).isinf().all()


def test_c_of_the_bisection(exact, monkeypatch):
    """From 0 on, up after a success and down after a failure, by halves of c_max; a failure at 0 stays there."""
    asked = []
    monkeypatch.setattr(ad, "minimise", lambda loss, x0, a, start, fast, x, c: asked.append((loss, c)) or x0 + 0.1)
    success = iter([[True, False], [False, False], [True, False]] + [[True, False]] * 17)
    monkeypatch.setattr(ad, "detect", lambda z_f, z_H, y: (torch.ones(2), torch.tensor(next(success))))
    model = model_of(Linear(1, (1, 2, 2)))
    found = ad.smallest_perturbation(model, 0.5, Steps("2", 9, 1, 1), 8.0, torch.full((1, 2, 1, 2, 2), 0.5), torch.zeros(1, 2).long())
    assert all(loss is ad.near_loss for loss, _ in asked)
    assert [c[0].tolist() for _, c in asked[:5]] == [[0, 0], [4, 0], [2, 0], [3, 0], [3.5, 0]] and len(asked) == 20
    assert found[0, 0].item() == pytest.approx(0.2) and found[0, 1].isinf()


# --- tables: what they ask for ---


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    """Two models of different norms; attacked_scores writes down what it is asked for. AUC: 1 and 0."""
    run, s = run_of(tmp_path, "--images", 40, "--few", 20, "--restarts", 7)
    setups = {"linf0.3": (Steps("inf", 0.3, 20, 0.05), Steps("inf", 0.3, 200, 0.01)),
              "linf0.5": (Steps("inf", 0.5, 20, 0.05), Steps("inf", 0.5, 200, 0.01)),
              "l2-2.5": (Steps("2", 2.5, 20, 0.1), Steps("2", 2.5, 200, 0.1))}
    pairs = {name: Model(nn.Linear(1, 1), nn.Linear(1, 1), torch.tensor([0.9, 0.8]), setups[name][1]) for name in ("linf0.3", "l2-2.5")}
    asked = []

    def scores(run, model, images, attacks, n, loss=logit_loss, starts=0):
        name = [name for name, its in pairs.items() if its.H is model.H][0]
        asked.append(SimpleNamespace(name=name, images=images, a=attacks[0], attacks=attacks, n=n, loss=loss, starts=starts, fast=model.fast))
        return torch.ones(2, 3), torch.tensor([[0.0] * n, [2.0] * n])
    monkeypatch.setattr(ad, "attacked_scores", scores)
    return SimpleNamespace(run=run, s=s, setups=setups, pairs=pairs, asked=asked, test=object())


def both(rows):
    """{quantity: value}; every name twice, d_1 (AUC 1) and d_2 (AUC 0)."""
    found = {row["quantity"]: row["value"] for row in rows}
    assert len(found) == len(rows) and all(v == float("d_1" in q) for q, v in found.items())
    return {q.split(", ", 1)[1] for q in found}


def test_tables_3_2_and_3_3(two_models):
    m = two_models
    for table, adam in ((ad.table_3_2, True), (ad.table_3_3, False)):
        m.asked.clear()
        rows = table(m.run, m.s, m.pairs, m.test)
        assert both(rows) == {f"{name}, {title}" for name in m.pairs for title in ("PGD", "more and smaller steps")}
        assert [(q.name, q.n, q.starts, len(q.attacks)) for q in m.asked] == [
            ("linf0.3", 40, 0, 1), ("l2-2.5", 40, 0, 1), ("linf0.3", 20, 0, 1), ("l2-2.5", 20, 0, 1)]
        assert all(row["clean"] == 3 and row["interval"] == [row["value"]] * 2 for row in rows)
        assert [q.a for q in m.asked] == [
            Steps("inf", 0.3, 200, 0.01, adam), Steps("2", 2.5, 200, 0.1, adam),
            Steps("inf", 0.3, 2000, 0.005, adam), Steps("2", 2.5, 2000, 0.05, adam)]
        assert all(q.images is m.test and q.loss is logit_loss for q in m.asked)
        assert {(row["n"], row["steps"], row["step"]) for row in rows} == {(40, 200, 0.01), (40, 200, 0.1), (20, 2000, 0.005), (20, 2000, 0.05)}


def test_table_3_1(two_models):
    m = two_models
    rows = {row["quantity"]: row["value"] for row in ad.table_3_1(m.pairs, m.setups)}
    assert rows["training attack, l2-2.5"] == "20 x 0.1" and rows["validation attack, linf0.3"] == "200 x 0.01"
    assert rows["validation AUC, mean, linf0.3"] == pytest.approx(0.85) and len(rows) == 6


def test_table_3_4_has_every_attack_on_every_model(two_models):
    m = two_models
    rows = ad.table_3_4(m.run, m.s, m.pairs, m.test, m.setups)
    assert both(rows) == {f"{name}, attack {other}" for name in m.pairs for other in m.setups}
    assert [(q.name, q.a, q.n) for q in m.asked] == [(name, m.setups[other][1], 40) for other in m.setups for name in m.pairs]


def test_table_3_5_has_restarts(two_models):
    m = two_models
    rows = ad.table_3_5(m.run, m.s, m.pairs, m.test)
    assert both(rows) == {f"{name}, {title}" for name in m.pairs for title in ("fixed start", "random starts")}
    assert [(q.name, q.starts, q.n, q.a) for q in m.asked] == [
        (name, starts, 20, m.pairs[name].check) for starts in (0, 7) for name in m.pairs]
    assert {row.get("starts") for row in rows if "random" in row["quantity"]} == {7}


def test_table_3_7_has_each_norm_s_own_sweep(two_models):
    m = two_models
    m.run.smoke = False
    rows = ad.table_3_7(m.run, m.s, m.pairs, m.test)
    assert len(both(rows)) == 7
    assert [(q.name, q.a.steps, pytest.approx(q.a.step)) for q in m.asked] == [
        ("linf0.3", 20, 0.075), ("linf0.3", 40, 0.01875), ("linf0.3", 200, 0.00375), ("linf0.3", 200, 0.01875),
        ("linf0.3", 500, 0.01875), ("l2-2.5", 20, 0.3125), ("l2-2.5", 50, 0.15625)]
    assert all(not q.a.adam and q.a.eps == m.pairs[q.name].check.eps and q.a.norm == m.pairs[q.name].check.norm for q in m.asked)


def test_untuned_attacks(two_models):
    m, f = two_models, nn.Linear(1, 1)
    rows = ad.untuned(m.run, m.s, f, m.pairs, m.test)
    assert both(rows) == {f"{name}, {title}" for name in m.pairs for title in ("worst of Adam and plain steps", "transfer from f")}
    assert [q.loss for q in m.asked[::2]] == [logit_loss, ad.softmax_loss]
    assert [q.name for q in m.asked] == 2 * list(m.pairs) and {q.n for q in m.asked} == {40}
    for q in m.asked[:2]:
        a = m.pairs[q.name].check
        assert q.attacks == [a, a._replace(adam=False), a._replace(adam=False, step=a.eps / 10)]
        assert q.fast.dtype == torch.float32 and torch.equal(q.fast.net.weight, m.pairs[q.name].H.weight)
    assert all(q.fast is f and q.attacks == [m.pairs[q.name].check] for q in m.asked[2:])


def test_published_numbers_meet_ours(two_models, monkeypatch):
    m = two_models
    m.run.smoke = False
    for dataset, channels in (("mnist", 1), ("cifar10", 3)):
        m.setups = {name: (a, a) for name, a in ad.MODELS[channels].items()}
        m.pairs.clear()
        for name, (_, a) in m.setups.items():
            m.pairs[name] = Model(nn.Linear(1, 1), nn.Linear(1, 1), torch.ones(2), a)
        ours = {"table3.1": ad.table_3_1(m.pairs, m.setups), "table3.4": ad.table_3_4(m.run, m.s, m.pairs, m.test, m.setups)}
        for name, table in (("3.2", ad.table_3_2), ("3.3", ad.table_3_3), ("3.5", ad.table_3_5), ("3.7", ad.table_3_7)):
            ours[f"table{name}"] = table(m.run, m.s, m.pairs, m.test)
        for experiment, rows in ours.items():
            theirs = {row["quantity"] for row in common.published("adv_detect", dataset, experiment)}
            assert theirs <= {row["quantity"] for row in rows}, (dataset, experiment)


def test_smallest_perturbations_are_judged_with_their_own_labels(tmp_path, monkeypatch):
    run, s = run_of(tmp_path, "--few", 30, "--chunk", 19)
    test = some_images(400)
    known = {row.numpy().tobytes(): int(y) for row, y in zip(test.x, test.y)}
    handed = []

    def smallest(model, T, a, c_max, x0, y):
        assert c_max == 8.0 and a == Steps("2", 1000, 500, 0.1) and T == 1020 and model is models[len(handed) // 2]
        handed.append((x0, y))
        k = torch.arange(10.0)[:, None].expand(y.shape)
        return torch.where((k == y) | (k > 6), math.inf, k + 1)
    monkeypatch.setattr(ad, "smallest_perturbation", smallest)
    z = torch.arange(400.0)[:, None] * torch.ones(10) + 1000 * torch.eye(10)[0]  # 1000 to 1399 is the largest of each
    monkeypatch.setattr(ad, "logits", lambda H, x: z[: len(x)])
    models = [model_of(Linear(10, (1, 28, 28))) for _ in range(2)]
    rows = ad.table_3_6(run, s, dict(zip(("A", "B"), models)), test, {"table3.6": Steps("2", 1000, 500, 0.1)})
    assert [x.shape[:2] for x, _ in handed] == 2 * [(10, 2), (10, 1)]
    x, y = (torch.cat(both, 1) for both in zip(*handed[:2]))
    flat = (x * 255).round().byte()
    assert torch.equal(flat, flat[:1].expand_as(flat)) and torch.equal(y, y[:1].expand_as(y))  # each towards every class
    assert len(flat[0].flatten(1).unique(dim=0)) == 3
    assert [known[row.numpy().tobytes()] for row in flat[0]] == y[0].tolist()
    mean = "mean l_2 of the smallest perturbation"
    assert [row["quantity"] for row in rows] == [
        quantity for name in "AB" for quantity in (f"{mean}, {name}, one target", f"{mean}, {name}, shortest", f"images broken, {name}")]
    ways = [k + 1.0 for i in range(3) for k in range(10) if k != y[0, i] and k < 7]  # 7 to 9 are never reached
    least = [2.0 if y[0, i] == 0 else 1.0 for i in range(3)]
    assert [row["value"] for row in rows[:3]] == pytest.approx([sum(ways) / len(ways), sum(least) / 3, 1.0])
    assert [row["n"] for row in rows[:3]] == [3, 3, 3]
    low, high = rows[0]["interval"]                                             # images are redrawn, each with all its ways
    assert min(ways) < low <= rows[0]["value"] <= high < max(ways) and high - low < 2
    colours, asked = some_images(400, shape=(3, 28, 28)), []
    monkeypatch.setattr(ad, "smallest_perturbation", lambda model, T, a, c_max, x0, y: asked.append(c_max) or torch.ones(y.shape))
    ad.table_3_6(run, s, {"A": models[0]}, colours, {"table3.6": Steps("2", 1000, 500, 0.1)})
    assert set(asked) == {65025.0}                                              # 255 squared


# --- figures ---


@pytest.mark.parametrize("its, used", [
    (Steps("inf", 0.7, 200, 0.01), Steps("inf", 0.7, 100, 0.1)),  # the figure's steps in the model's ball
    (Steps("2", 0.7, 200, 0.01), Steps("2", 0.7, 200, 0.01)),    # steps of l_inf could be too short: the model's own
])
def test_figure_3_2_counts_what_it_says(tmp_path, monkeypatch, its, used):
    """f and z_H are made up, others for each attack and each of its three steps. T is of all clean images."""
    run, s = run_of(tmp_path, "--images", 30, "--few", 20, "--chunk", 30)
    test, asked, steps = some_images(24), [], 3
    values = torch.randn(24, 10)
    attacked = torch.randn(len(ad.LOSSES), steps + 1, 20, 10)
    read = torch.randint(10, (len(ad.LOSSES), steps + 1, 20))
    number = {loss: i for i, loss in enumerate(ad.LOSSES.values())}
    f = nn.Linear(1, 1)
    H = Linear(10, (1, 28, 28))
    model = model_of(H, its)

    def fake(judge, loss, x0, a, start, fast_f, fast, y):
        i = sum(len(x) for it, *_, x in asked if it is loss)
        asked.append((loss, a, x0 is start, fast_f, fast, y, x0))
        place = torch.arange(i, i + len(x0)).view(-1, 1, 1, 1)
        seen = []
        for t in range(steps + 1):                                              # an image says which it is
            seen.append(judge(100 * (1 + number[loss]) + 25.0 * t + place))
        return torch.stack(seen, -1)

    def logits(net, x):
        if x.amax() < 2:                                                        # clean
            return F.one_hot(test.y, 10).float() if net is f else values
        code = x.flatten().long()
        i, t, n = code // 100 - 1, code % 100 // 25, code % 25
        return F.one_hot(read[i, t, n], 10).float() if net is f else attacked[i, t, n]
    monkeypatch.setattr(ad, "judged", fake)
    monkeypatch.setattr(ad, "logits", logits)
    monkeypatch.setattr(common, "bootstrap", lambda statistic, z_clean, z: [statistic(z_clean, z).item()] * 2)
    lines = []
    monkeypatch.setattr(common.Run, "lines", lambda self, name, rows, x, **_: lines.append((name, x, rows)))
    rows = ad.figure_3_2(run, s, f, {"A": model, "B": None}, test, {"figure3.2": Steps("inf", 0.3, 100, 0.1)})
    assert [loss for loss, *_ in asked[::5]] == list(ad.LOSSES.values())
    drawn = [(f"figure3.2-{way}", "tpr", [row for row in rows if f"FPR, {way}," in row["quantity"]]) for way in ("integrated", "generative")]
    assert lines == drawn and all(len(rows) == 5 * (1 + len(ad.LOSSES)) for *_, rows in lines)
    assert all(a == used and same for _, a, same, *_ in asked)
    assert all(torch.equal(fast_f.net.weight, f.weight.to(fast_f.dtype)) and fast is H for _, _, _, fast_f, fast, *_ in asked)
    assert [len(x) for *_, x in asked[:5]] == [4, 4, 4, 4, 4]
    y = test.y[:20]
    assert torch.equal(torch.cat([part for *_, part, _ in asked[:5]]), y)
    assert torch.equal(torch.cat([x for *_, x in asked[:5]]), test.take(slice(0, 20)))
    found = {(row["quantity"], row.get("tpr")): row for row in rows}
    assert len(found) == len(rows) and found["natural acc, integrated", None]["value"] == 1
    for way in ("integrated", "generative"):
        clean = values[torch.arange(24), test.y] if way == "integrated" else values.amax(1)
        for title, these in (*((title, [i]) for i, title in enumerate(ad.LOSSES)), ("all of these", range(len(ad.LOSSES)))):
            k = read if way == "integrated" else attacked.argmax(-1)
            z = attacked.gather(-1, k[..., None])[..., 0].where(k != y, -math.inf)[list(these)].amax((0, 1))
            for tpr in (0.9, 0.95, 1.0):
                T = sorted(clean.tolist(), reverse=True)[math.ceil(tpr * 24) - 1]
                row = found[f"FPR, {way}, {title}", tpr]
                assert row["value"] == pytest.approx((z >= T).float().mean().item()) and row["n"] == 20 and "interval" in row
            right = (clean[:20] > 0).sum() + (z[z.isfinite()] <= 0).sum()
            row = found[f"accuracy (3.19), {way}, {title}", None]
            assert row["value"] == pytest.approx(right.item() / row["n"]) and row["n"] == 20 + z.isfinite().sum()
    for i, title in enumerate(ad.LOSSES):
        wrong = read[i] != y
        turned = (wrong[3] != wrong[2]).float().mean().item()                   # of steps 2 and 3
        assert found[f"share of later steps that turn f's reading, {title}", None]["value"] == pytest.approx(turned)
    assert found["natural acc, generative", None]["value"] == pytest.approx((values.argmax(1) == test.y).float().mean().item())


def test_targeted_images(tmp_path, monkeypatch):
    run, _ = run_of(tmp_path)
    H, robust = Detectors(small_nets(10)), ad.network(10, (1, 28, 28), 0.1, "cpu")
    x, seen = torch.rand(10, 9, 1, 28, 28), {}
    monkeypatch.setattr(common.Run, "pictures", lambda self, name, rows, columns: seen.update(rows))

    def f(x):                                                                   # reads a class off the first pixel
        return F.one_hot((x[:, 0, 0, 0] * 9.99).long(), 10).float()
    x[:, :, 0, 0, 0] = 0.35                                                     # class 3
    models = {"A": model_of(H), "B": None}
    rows = ad.towards(run, "figure3.3", f, robust, models, x, Steps("inf", 0.2, 5, 0.1))
    assert [row["quantity"].split(", ")[-1] for row in rows] == ["start", "generative", "softmax"]
    assert list(seen) == [f"{title}; a column for each target, class 0 to 9" for title in ("start", "generative", "softmax")]
    assert rows[0]["value"] == 0.1 and rows[0]["n"] == 90 and rows[0]["eps"] == 0.2
    start, generative, softmax = (v.unflatten(0, (4, 10)).transpose(0, 1) for v in seen.values())
    assert torch.equal(start, x[:, :4])
    assert (H(generative) > H(start)).all() and (generative - start).abs().max() <= 0.2001
    for k in range(10):                                                         # its own target, each
        assert (robust(softmax[k])[:, k] > robust(start[k])[:, k]).all()
    asked = []

    def attack(loss, x0, a, start, net):                                        # class k, or class 0, for all
        asked.append((loss, x0, start))
        k = torch.arange(10) if loss is logit_loss else torch.zeros(10)
        made = start.clone()
        made[:, :, 0, 0, 0] = (k[:, None] + 0.5) / 10
        return made
    monkeypatch.setattr(ad, "minimise", attack)
    rows = ad.towards(run, "figure3.3", f, robust, models, x, Steps("inf", 0.2, 5, 0.1))
    assert [row["value"] for row in rows] == [0.1, 1.0, 0.1] and all(x0 is x and start is x for _, x0, start in asked)


def test_figures_3_3_and_3_6_hand_over_their_images(monkeypatch):
    images, handed = some_images(400), []
    images.x[images.y == 2] //= 4                                               # class 2 is dark
    images.x[images.y == 4, 0, 3, 3] = images.x[images.y == 4, 0, 9, 9]         # two pixels of class 4 are alike
    monkeypatch.setattr(ad, "towards", lambda *a: handed.append(a) or [])
    source = {"figure3.3": "a", "figure3.6": "b"}
    s = SimpleNamespace(few=12, restarts=3)
    monkeypatch.setattr(ad, "logits", lambda net, x: net(x))
    tries = []

    def against(net, x, y, a):                                                  # each start breaks an image of its own
        tries.append((x, y, a))
        return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == len(tries), x - 4, x)
    monkeypatch.setattr(ad, "against", against)

    def robust(x):                                                              # right, but for image 5 and what is attacked
        of = [next(i for i in range(12) if torch.allclose(x_i + 4 * (x_i.amin() < 0), images.take([i])[0], atol=1e-5)) for x_i in x]
        y = images.y[torch.tensor(of)] + (x.amin((1, 2, 3)) < 0).long() + (torch.tensor(of) == 5)
        return F.one_hot(y % 10, 10).float()
    source["robust"] = Steps("inf", 0.3, 40, 0.01, False)
    run = SimpleNamespace(smoke=False, chunk=100)
    found = {row["quantity"]: row for row in ad.figure_3_3(run, s, "f", robust, "models", images, source)}
    assert found["natural acc, softmax"]["value"] == 11 / 12 and found["robust acc, softmax"]["value"] == 8 / 12
    assert len(tries) == 3 and {a for *_, a in tries} == {Steps("inf", 0.3, 100, 0.01, False)}
    assert (found["robust acc, softmax"]["steps"], found["robust acc, softmax"]["starts"]) == (100, 3)
    handed[0] = ("run", handed[0][1], "f", "robust", *handed[0][4:])
    ad.figure_3_6("run", "f", "robust", "models", images, source)
    assert [h[:5] for h in handed] == [("run", f"figure3.{i}", "f", "robust", "models") for i in (3, 6)]
    assert [h[6] for h in handed] == ["a", "b"]
    x = handed[0][5]
    assert x.shape == (10, 30, 1, 28, 28)
    for k in range(10):                                                         # none is of its target's class
        assert torch.equal(x[k], images.take(rows_of(images, False)[k][:30]))
    seeds = handed[1][5]
    assert seeds.shape == (10, 20, 1, 28, 28) and seeds.min() >= 0 and seeds.max() <= 1 and seeds.dtype == torch.float32
    means = seeds.mean((1, 2, 3, 4))
    assert means[2] == pytest.approx(images.take(rows_of(images, True)[2]).mean().item(), abs=0.02) and means[[0, 1, 3]].min() > 0.4
    own, spread = images.take(rows_of(images, True)[0]), seeds[0].flatten(1).std(0).mean()
    assert spread == pytest.approx(own.flatten(1).std(0).mean().item(), rel=0.25)  # the class' covariance
    assert len(seeds.flatten(0, 1).flatten(1).unique(dim=0)) == 200
    assert torch.corrcoef(seeds[4, :, 0, [3, 9], [3, 9]].T)[0, 1] > 0.9 > torch.corrcoef(seeds[5, :, 0, [3, 9], [3, 9]].T)[0, 1]


def test_experiments_get_what_they_should():
    """Test images and f, but for figure 3.6, which fits Gaussians to training images."""
    asked = {name: set(inspect.signature(e.function).parameters) - {"run", "s", "setups", "source"} for name, e in ad.EXPERIMENTS.items()}
    assert asked == {
        "table3.1": {"models"}, "table3.2": {"pairs", "test"}, "table3.3": {"pairs", "test"}, "table3.4": {"pairs", "test"},
        "table3.5": {"pairs", "test"}, "table3.6": {"models", "test"}, "table3.7": {"pairs", "test"},
        "figure3.2": {"f", "models", "test"}, "figure3.3": {"f", "robust", "models", "test"},
        "figure3.6": {"f", "robust", "models", "train"}, "untuned": {"f", "pairs", "test"}}


# --- the script ---


def wiring(tmp_path, monkeypatch, *flags):
    """What main hands to training and to the experiments."""
    made = SimpleNamespace(classifiers=[], detectors=[], have=None)

    def classifier(run, name, **options):
        made.classifiers.append((name, options))
        return name

    def detectors(run, s, name, *given):
        made.detectors.append((name, *given))
        return name
    monkeypatch.setattr(common, "train_classifier", classifier)
    monkeypatch.setattr(ad, "train_detectors", detectors)
    monkeypatch.setattr(ad, "first_two", lambda model: f"two of {model}")
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: setattr(made, "have", have))
    ad.main(["--out", str(tmp_path), "--device", "cpu", *map(str, flags)])
    made.have = {key: thing() if isinstance(thing, common.once) else thing for key, thing in made.have.items()}
    return made


def test_main_hands_over_what_it_should(tmp_path, monkeypatch):
    made = wiring(tmp_path, monkeypatch, "--models", "linf0.5,l2-5.0")
    have = made.have
    assert have["models"] == {"linf0.5": "linf0.5", "l2-5.0": "l2-5.0"} and have["f"] == "f" and have["robust"] == "robust"
    assert have["pairs"] == {name: f"two of {name}" for name in have["models"]}
    name, a, check, build, f, train, validation = made.detectors[1]
    assert (name, f) == ("l2-5.0", None) and (a, check) == (Steps("2", 5.0, 20, 0.1), Steps("2", 5.0, 200, 0.1))
    assert made.detectors[0][1:3] == have["setups"]["linf0.5"] == (Steps("inf", 0.5, 20, 0.05), Steps("inf", 0.5, 200, 0.01))
    assert set(have["setups"]) == set(ad.MODELS[1]) and have["source"] == ad.OTHERS[1]
    data, test = (common.load_images("glyphs", split) for split in ("train", "test"))
    held, left = ({row.numpy().tobytes() for row in images.x} for images in (validation, train))
    assert len(validation) == len(data) // 6 and len(train) + len(validation) == len(data)
    everything = [row.numpy().tobytes() for row in data.x]
    assert sorted(row.numpy().tobytes() for row in torch.cat([train.x, validation.x])) == sorted(everything)
    assert len(held & left) < 0.01 * len(held) and have["train"] is train       # (a few glyphs are drawn twice)
    order = common.shuffled(len(test), 123)
    assert torch.equal(have["test"].x, test.x[order]) and torch.equal(have["test"].y, test.y[order])
    (name, options), (other, against) = made.classifiers
    assert (name, other) == ("f", "robust") and "adversary" not in options and options["data"] is train
    assert options["batch"] == against["batch"] == 32 and options["iterations"] == 400 and against["iterations"] == 4000 and against["data"] is train
    a = Steps("inf", 0.3, 10, 0.04, False)
    assert against["adversary"].func is ad.against and against["adversary"].keywords == {"a": a} and against["made_from"] == {"attack": a}
    assert against["build"]().head.out_features == 10 and build(1).head.out_features == 1
    assert build(1).head.in_features == 256                                     # --width


def test_main_for_colour(tmp_path, monkeypatch, write_npz):
    folder = write_npz("cifar10", 240)
    made = wiring(tmp_path, monkeypatch, "--dataset", "cifar10", "--data-dir", folder, "--images", 100, "--budget", "paper")
    assert list(made.have["models"]) == list(ad.MODELS[3]) and made.have["source"] == ad.OTHERS[3]
    name, a, check, build, f, train, validation = made.detectors[0]
    assert f == "f" and a == check == ad.MODELS[3]["linf8"]                     # fine-tuned; attacked as in training
    assert made.classifiers[0][1]["augment"] == "crop_flip" and made.classifiers[0][1]["sgd"] == 0.1
    assert len(made.classifiers[0][1]["data"]) == 200                           # f does not know validation images
    assert made.classifiers[1][1]["made_from"]["attack"] == ad.OTHERS[3]["robust"]


def test_smoke_of_every_experiment(tmp_path, capsys):
    argv = ["--budget", "smoke", "--out", str(tmp_path), "--models", "linf0.3,l2-2.5", "--device", "cpu"]
    ad.main([*argv, "--only", *ad.EXPERIMENTS])
    file = tmp_path / "adv_detect-glyphs" / "results.json"
    results = json.loads(file.read_text())
    assert set(results) == set(ad.EXPERIMENTS)
    for name, entry in results.items():
        numbers = [row["value"] for row in entry["rows"] if not isinstance(row["value"], str)]
        assert numbers and all(map(math.isfinite, numbers)), name
    for name in ("figure3.2-integrated", "figure3.2-generative", "figure3.3", "figure3.6"):
        assert (tmp_path / "adv_detect-glyphs" / f"{name}.png").exists()
    capsys.readouterr()
    ad.main([*argv, "--only", "table3.2", "figure3.6"])                         # the same without those before it
    assert "3 updates" not in capsys.readouterr().out                           # checkpoints are used
    again = json.loads(file.read_text())
    for name in ("table3.2", "figure3.6"):
        assert again[name]["rows"] == results[name]["rows"]


def test_smoke_on_colour(tmp_path, write_npz):
    y = np.arange(240) % 3  # of three classes, so three detectors
    data = write_npz("cifar10", 240, y_train=y, y_test=y)
    ad.main(["--budget", "smoke", "--dataset", "cifar10", "--data-dir", str(data), "--out", str(tmp_path),
             "--models", "linf8", "--device", "cpu", "--only", "table3.1", "table3.4"])
    rows = json.loads((tmp_path / "adv_detect-cifar10" / "results.json").read_text())["table3.4"]["rows"]
    assert {f"AUC of d_1, linf8, attack {other}" for other in ad.MODELS[3]} < {row["quantity"] for row in rows}


@pytest.mark.parametrize("argv, says", [
    (["--models", "linf0.4"], "linf0.4"), (["--only", "table3.12"], "table3.12"), (["--batch", "0"], "batch"),
    (["--width", "0.001"], "width"), (["--images", "-3"], "-3"), (["--images", "99999"], "images"), (["--restarts", "0"], "restarts")])
def test_bad_input_ends_in_one_line(outcome, tmp_path, argv, says):
    code, err = outcome(ad, *argv, "--budget", "smoke", "--out", tmp_path / "out")
    assert code == 2 and says in err and len(err.strip().splitlines()) == 1


def test_other_settings_than_the_checkpoint_s_are_refused(outcome, tmp_path):
    argv = ["--budget", "smoke", "--out", tmp_path, "--only", "table3.1", "--device", "cpu"]
    assert outcome(ad, *argv)[0] == 0
    for flag in (["--batch", 3], ["--train-steps", 3], ["--check-steps", 3], ["--val-images", 5], ["--width", 0.15]):
        code, err = outcome(ad, *argv, *flag)
        assert code == 2 and "linf0.3.pt was made with" in err, flag
    assert outcome(ad, *argv, "--images", "14")[0] == 0                         # evaluation may change


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_attacks_on_a_gpu_are_those_of_the_cpu(exact):
    H, x = Detectors(small_nets(4)), torch.rand(4, 3, 1, 28, 28)
    there = copy.deepcopy(H).cuda()
    assert torch.allclose(H(x), there(x.cuda()).cpu(), atol=1e-3)
    for adam in (True, False):
        a = Steps("inf", 0.1, 8, 0.02, adam)
        found = minimise(logit_loss, x.cuda(), a, x.cuda(), there).cpu()
        assert torch.allclose(H(found), H(minimise(logit_loss, x, a, x, H)), atol=0.05)
