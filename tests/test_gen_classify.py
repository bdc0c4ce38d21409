"""gen_classify.py: Bayes' rule, attacks, training of all d_k, calibration, interpretation, tables, the script as a whole."""
import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import common
import gen_classify as gc
from common import Images
from conftest import FakeRun, Killed

SMOKE = gc.SETTINGS["glyphs", "smoke"]
SHAPE = (1, 28, 28)


@pytest.fixture
def run(tmp_path):
    return FakeRun(tmp_path / "run")


def some_images(n=60, seed=1, name="made up", shape=SHAPE):
    g = torch.Generator().manual_seed(seed)
    return Images(torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=g), torch.arange(n) % 10, name)


def small_d(K=3, seed=0):
    torch.manual_seed(seed)
    nets = [common.make_net("mnist_cnn", 1, SHAPE, 0.05).eval() for _ in range(K)]
    return gc.Detectors(nets).requires_grad_(False)


class Linear(nn.Module):
    """z = W x of the flattened image; of images [n, 1, 1, 3] the pixels themselves where W is 1."""

    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, x):
        return x.flatten(1) @ self.W.T


# --- the rule ---


def test_bayes_rule_adds_the_constants():
    d, x = small_d(), torch.rand(5, *SHAPE)
    c = torch.tensor([0.5, -1.0, 2.0])
    assert torch.allclose(gc.Generative(d, c)(x), d(x) + c) and gc.Generative(d, c)(x).shape == (len(x), d.K)


def test_calibration_finds_the_constants_that_were_taken_away(monkeypatch):
    """Scores z of a perfectly calibrated classifier, less constants: cross-entropy gives the constants back."""
    torch.manual_seed(0)
    z = torch.randn(4000, 3) * 2
    y = torch.distributions.Categorical(logits=z).sample()
    taken = torch.tensor([1.0, 0.0, -1.0])
    monkeypatch.setattr(gc, "logits_of", lambda d, x: z - taken)

    class Three:
        K = 3
    images = Images(torch.zeros(4000, 1, 1, 1, dtype=torch.uint8), y, "made up")
    assert torch.allclose(gc.calibrate(Three(), images), taken, atol=0.15)
    loss = F.cross_entropy(z - taken + gc.calibrate(Three(), images), y)
    assert loss <= F.cross_entropy(z, y) + 1e-6  # it is the optimum


# --- attacks ---


def test_losses_of_attacks_by_hand():
    z, y, k = torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1]), torch.tensor([0])
    assert gc.entropy_attack(z, y, k).item() == pytest.approx(-F.cross_entropy(z, y).item())
    assert gc.margin_attack(z, y, k).item() == 2 and gc.class_attack(z, y, k).item() == -1
    assert gc.class_margin_attack(z, y, k).item() == 3
    assert {name: each for name, (_, each) in gc.ATTACKS.items()} == {
        "cross-entropy (3.46)": False, "margin": False, "class by class (3.47)": True, "margin class by class": True}


def test_a_step_down_by_hand():
    x0 = torch.full((1, 1, 1, 2), 0.5)
    gradient = torch.tensor([3.0, -4.0]).view(1, 1, 1, 2)
    assert gc.down(x0, gradient, x0, gc.Radius(9.0, 1, 0.1)).flatten().tolist() == pytest.approx([0.44, 0.58])
    assert gc.down(x0, gradient, x0, gc.Radius(0.05, 1, 0.1)).flatten().tolist() == pytest.approx([0.47, 0.54])
    assert gc.down(x0, gradient, x0, gc.Radius(9.0, 1, 9.0)).flatten().tolist() == [0, 1]
    assert torch.equal(gc.down(x0, 0 * gradient, x0, gc.Radius(9.0, 1, 0.1)), x0)
    both = torch.cat([gradient, 100 * gradient])  # each image has its own length
    assert torch.allclose(gc.down(x0.repeat(2, 1, 1, 1), both, x0, gc.Radius(9.0, 1, 0.1))[1].flatten(), torch.tensor([0.44, 0.58]))


def test_an_image_is_broken_if_any_step_misread_it():
    """Down class 0's output: from .6 it falls below class 1's .5 at once, and never comes back up; or it was wrong before."""
    net = Linear(torch.eye(3))
    x = torch.tensor([[0.6, 0.5, 0.0], [0.9, 0.1, 0.0], [0.2, 0.5, 0.0]]).view(3, 1, 1, 3)
    y, k = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.long)
    end, misread = gc.attack(net, x, y, k, gc.class_margin_attack, gc.Radius(0.2, 4, 0.1))
    assert misread.tolist() == [True, False, True] and gc.length(end - x).max() < 0.2001

    def there_and_back(z, y, k):  # down the margin of an image that is read rightly, up that of one that is not
        return gc.margin_attack(z, y, k) * torch.where(z[:, 0] > z[:, 1], 1.0, -9.0)
    _, misread = gc.attack(net, x[:1], y[:1], k[:1], there_and_back, gc.Radius(9.0, 2, 0.1))
    end, _ = gc.attack(net, x[:1], y[:1], k[:1], there_and_back, gc.Radius(9.0, 2, 0.1))
    assert net(end).argmax(1).item() == 0 and misread.item()  # read rightly in the end, but not on the way

    def back(z, y, k):  # up the margin: an image that was misread is soon read rightly
        return -gc.margin_attack(z, y, k)
    end, misread = gc.attack(net, x[2:], y[2:], k[2:], back, gc.Radius(9.0, 6, 0.1))
    assert net(end).argmax(1).item() == 0 and misread.item()  # misread at first
    _, misread = gc.attack(net, x[:1], y[:1], k[:1], gc.margin_attack, gc.Radius(9.0, 1, 0.1))
    assert misread.item()  # misread at the end alone
    with pytest.raises(ValueError):
        gc.attack(net, x + 1, y, k, gc.class_attack, gc.Radius(9.0, 1, 0.1))


def test_attacks_class_by_class_try_every_other_class(run, monkeypatch):
    tried = []

    def attack(net, x, y, k, loss, a):
        tried.append((len(x), k.tolist()))
        return x, k == 2
    monkeypatch.setattr(gc, "attack", attack)
    x, y = torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    run.chunk = 2
    still = torch.tensor([True, True, True])
    left = gc.unbroken(run, None, x, y, 3, still, gc.class_attack, True, gc.Radius(1.0, 2, 0.5))
    assert tried == [(2, [1, 2]), (1, [0]), (2, [2, 1])]  # the second image is broken, and drops out
    assert left.tolist() == [False, False, True] and still.all()
    tried.clear()
    gc.unbroken(run, None, x, y, 3, still, gc.margin_attack, False, gc.Radius(1.0, 2, 0.5))
    assert len(tried) == 2  # once for each part
    tried.clear()
    left = gc.unbroken(run, None, x, y, 3, ~still, gc.class_attack, True, gc.Radius(1.0, 2, 0.5))
    assert not tried and not left.any()  # images that were broken before stay so


def test_3_48_takes_the_image_with_the_largest_output(run):
    """d_k is pixel k: the attack turns pixels up, as far as the ball lets it, and c decides between equals."""
    class Pixels(nn.Module):
        K = 3

        def forward(self, x):
            return x.flatten(1) if x.dim() == 4 else torch.stack([x[k, :, 0, 0, k] for k in range(3)])
    d = Pixels()
    x = torch.tensor([[0.5, 0.2, 0.1], [0.2, 0.5, 0.1]]).view(2, 1, 1, 3)
    y = torch.tensor([0, 1])
    a = gc.Radius(0.3, 20, 0.03)
    made = gc.likest_images(gc.Generative(d, torch.zeros(3)), x, y, a).flatten(1)
    assert made[0].tolist() == pytest.approx([0.5, 0.5, 0.1], abs=0.02)  # class 1, .2 + .3, before class 2
    assert made[1].tolist() == pytest.approx([0.5, 0.5, 0.1], abs=0.02)  # class 0, never its own, 1
    c = torch.tensor([0.0, 0.0, 0.3])
    made = gc.likest_images(gc.Generative(d, c), x, y, a).flatten(1)
    assert made[:, 2].tolist() == pytest.approx([0.4, 0.4], abs=0.02)


def test_3_48_against_brute_force():
    """Linear d_k of three pixels: no point of 20,000 in the ball has a larger output of a class but the label."""
    torch.manual_seed(1)
    W = torch.randn(3, 3)

    class Linear3(nn.Module):
        K = 3

        def forward(self, x):
            return x.flatten(1) @ W.T if x.dim() == 4 else torch.einsum("knp,kp->kn", x.flatten(2), W)
    net, x, y = gc.Generative(Linear3(), torch.tensor([0.1, 0.0, -0.1])), torch.full((3, 1, 1, 3), 0.5), torch.arange(3)
    made = gc.likest_images(net, x, y, gc.Radius(0.2, 30, 0.02))
    assert gc.length(made - x).max() < 0.2001
    points = 0.5 + 0.2 * F.normalize(torch.randn(20_000, 3)) * torch.rand(20_000, 1) ** (1 / 3)
    for label in range(3):
        others = [k for k in range(3) if k != label]
        found = net(made[label : label + 1])[0, others].max()
        best = net(points.view(-1, 1, 1, 3))[:, others].max()
        assert best - 1e-4 <= found <= best + 0.02


def test_the_source_attacks_each_classifier_in_its_own_way(run, monkeypatch):
    seen = []
    monkeypatch.setattr(gc, "likest_images", lambda net, x, y, a: seen.append((net, len(x), a)) or x)
    monkeypatch.setattr(gc, "attack", lambda net, x, y, k, loss, a: (seen.append((net, loss, a)) or x + 1, None))
    run.chunk = 2
    x, y = torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    generative, softmax = gc.Generative(small_d(3), torch.zeros(3)), nn.Identity()
    assert torch.equal(gc.source_attack(run, generative, x, y, "a"), x)
    assert torch.equal(gc.source_attack(run, softmax, x, y, "b"), x + 1)
    assert seen == [(generative, 2, "a"), (generative, 1, "a")] + [(softmax, gc.entropy_attack, "b")] * 2


def test_foolbox_or_torchattacks_do_not_find_more(run, exact):
    """PGD on cross-entropy of another library breaks no image that ours, at the same radius and steps, leaves."""
    torchattacks = pytest.importorskip("torchattacks")
    net = gc.Generative(small_d(3), torch.zeros(3))
    x = torch.rand(12, *SHAPE)
    y = net(x).argmax(1)
    a = gc.Radius(0.5, 20, 0.1)
    still = gc.natural(net, x, y)
    for loss, each in gc.ATTACKS.values():
        still = gc.unbroken(run, net, x, y, 3, still, loss, each, a)
    theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.1, steps=20, random_start=False)(x, y)
    assert not (still & (net(theirs).argmax(1) != y)).any()


# --- training ---


def test_lists_of_images_are_balanced():
    images = some_images(70)
    images.y[:30] = torch.tensor([0] * 20 + [1] * 10)  # 0 and 1 are more frequent
    own, others = gc.lists_of(images, [0, 4])
    assert (images.y[own[0]] == 0).all() and (images.y[own[1]] == 4).all() and len(own[1]) == int((images.y == 4).sum())
    counts = images.y[others[1]].bincount(minlength=10)
    assert counts[4] == 0 and len(set(counts.tolist()) - {0}) == 1  # each other class as often as any


def test_an_update_by_hand(run, monkeypatch, exact):
    """Eq. 3.45: both sides attacked in their own balls; each d_k gets the gradient that it would get alone."""
    s = replace(SMOKE, updates=1, batch=3, eps_out=1.0, eps_in=0.5, steps=2, lr=0.1, weight_decay=0.01)
    train = some_images()
    calls, before = [], []
    real, build = gc.repeat, common.make_net

    def repeat(step, x, n, *rest):
        calls.append((step, x.clone(), n, rest, real(step, x, n, *rest)))
        return calls[-1][-1]
    monkeypatch.setattr(gc, "repeat", repeat)

    def remember(*a):
        net = build(*a)
        before.append(copy.deepcopy(net))
        return net
    monkeypatch.setattr(common, "make_net", remember)
    d = gc.train_d(run, s, "d", train, range(3))
    (up, x_out, n_out, about_out, out_adv), (into, x, n_in, about_in, in_adv) = calls
    assert up is into is gc.training_step and n_out == n_in == 2
    assert about_out[2:] == (gc.Radius(1.0, 2, 0.2), -1) and about_in[2:] == (gc.Radius(0.5, 2, 0.1), 1)
    own, others = gc.lists_of(train, range(3))
    assert torch.equal(x, gc.draw_images(train, own, 3, run.seed + 50, 0, "none"))
    assert torch.equal(x_out, gc.draw_images(train, others, 3, run.seed, 0, "none"))
    for k, net in enumerate(before):
        z, z_out = net(in_adv[k])[:, 0], net(out_adv[k])[:, 0]
        loss = (F.softplus(-z).mean() + F.softplus(z_out).mean()) / 2
        loss.backward()
        for was, new in zip(net.parameters(), d.nets[k].parameters()):
            assert torch.allclose(new, was - 0.1 * (was.grad + 0.01 * was), atol=1e-5)


def test_attacks_in_training_go_the_right_way(exact):
    d = small_d()
    x = torch.rand(3, 4, *SHAPE)
    a = gc.Radius(1.0, 5, 0.2)
    for sign in (1, -1):
        moved = common.repeat(gc.training_step, x, 5, d, x, a, sign)
        change = sign * (d(moved) - d(x))
        assert change.max() <= 0 and (change < 0).float().mean() > 0.9 and gc.length(moved - x).max() < 1.0001


def test_3_39_attacks_other_classes_alone(run, monkeypatch):
    calls, real = [], gc.repeat
    monkeypatch.setattr(gc, "repeat", lambda step, x, n, *rest: calls.append(rest[-1]) or real(step, x, n, *rest))
    gc.train_d(run, replace(SMOKE, updates=2, eps_in=0.0), "d", some_images(), range(3))
    assert calls == [-1, -1]


def test_an_auxiliary_set_is_half_of_p0(run, monkeypatch):
    seen, auxiliary = [], Images(torch.full((9, *SHAPE), 255, dtype=torch.uint8), torch.zeros(9), "white")
    real = gc.repeat
    monkeypatch.setattr(gc, "repeat", lambda step, x, n, *rest: seen.append(x.clone()) or real(step, x, n, *rest))
    gc.train_d(run, replace(SMOKE, updates=1, batch=4), "d", some_images(), range(3), auxiliary)
    white = (seen[0] == 1).flatten(2).all(2)
    assert white.tolist() == [[True, True, False, False]] * 3


def test_the_rate_falls_to_a_tenth_in_the_last_quarter(run):
    gc.train_d(run, replace(SMOKE, updates=4), "d", some_images(), range(2))
    state = torch.load(run.folder / "d.pt", weights_only=True)
    assert state["schedule"]["milestones"] and state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(SMOKE.lr / 10)


def test_killed_and_resumed_equals_unbroken(tmp_path, monkeypatch):
    train, s = some_images(), replace(SMOKE, updates=4)
    whole = gc.train_d(FakeRun(tmp_path / "whole"), s, "d", train, range(2))
    run, real, count = FakeRun(tmp_path / "cut"), gc.repeat, []
    monkeypatch.setattr(common.Training, "SAVE_SECONDS", 0)

    def repeat(*a):
        count.append(1)
        if len(count) > 2:
            raise Killed
        return real(*a)
    monkeypatch.setattr(gc, "repeat", repeat)
    with pytest.raises(Killed):
        gc.train_d(run, s, "d", train, range(2))
    monkeypatch.setattr(gc, "repeat", real)
    resumed = gc.train_d(run, s, "d", train, range(2))
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_batchnorm_is_the_same_function_in_attack_and_update(run):
    s = replace(SMOKE, net="resnet18", width=0.125, updates=1)
    d = gc.train_d(run, s, "d", some_images(shape=(3, 32, 32)), range(2))
    for layer in d.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert not layer.training and layer.running_mean.abs().max() == 0 and (layer.running_var == 1).all()


@pytest.mark.parametrize("how", ["none", "crop", "auto", "mixup", "cutmix"])
def test_augmentations(how):
    images = some_images(shape=(3, 32, 32))
    lists, _ = gc.lists_of(images, range(3))
    plain = gc.draw_images(images, lists, 4, 0, 0, "none")
    x = gc.draw_images(images, lists, 4, 0, 0, how)
    assert x.shape == (3, 4, 3, 32, 32) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(x, plain) == (how == "none")
    if how in ("mixup", "cutmix"):  # nothing comes from another list
        flat = torch.stack([torch.full((4, 3, 32, 32), level) for level in (0.1, 0.5, 0.9)])
        assert torch.allclose(gc.mixed(flat, how), flat)
        levels = torch.tensor([0.0, 0.3, 1.0])
        x = gc.mixed(levels[None, :, None, None, None].expand(2, 3, 3, 32, 32), how).flatten(2)
        kinds = [len(image.unique()) for image in x.flatten(0, 1)]
        if how == "mixup":  # images of one level each, between two of the old
            assert set(kinds) == {1} and not torch.isin(x, levels).all()
        else:  # a rectangle of another image
            assert set(kinds) <= {1, 2} and 2 in kinds and torch.isin(x, levels).all()


def test_auto_augment_gives_each_image_of_a_list_its_own_draw(monkeypatch):
    drawn = []

    class Negative:
        def __init__(self, policy):
            assert policy is gc.AutoAugmentPolicy.CIFAR10

        def __call__(self, x):
            assert x.dtype == torch.uint8
            drawn.append(x.shape)
            return 255 - x
    monkeypatch.setattr(gc, "AutoAugment", Negative)
    images = some_images(shape=(3, 32, 32))
    lists, _ = gc.lists_of(images, range(3))
    cropped = gc.draw_images(images, lists, 4, 0, 0, "crop")
    assert torch.allclose(gc.draw_images(images, lists, 4, 0, 0, "auto"), 1 - cropped, atol=1e-6)
    assert drawn == 4 * [(3, 3, 32, 32)]


def test_the_adversary_attacks_in_eval_mode_and_restores_it(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 3)).train()
    modes = []
    monkeypatch.setattr(gc, "attack", lambda net, x, y, k, loss, a: modes.append((net.training, loss, a)) or (x, None))
    gc.adversary(net, torch.rand(2, *SHAPE), torch.tensor([0, 1]), "a")
    assert modes == [(False, gc.entropy_attack, "a")] and net.training


# --- what a person can see ---


def test_class_seeds_have_the_mean_and_spread_of_the_class():
    g = torch.Generator().manual_seed(0)
    x = 0.5 + 0.1 * torch.randn(4000, 1, 2, 2, generator=g) * torch.tensor([[1.0, 0.2], [0.5, 0.1]])
    x[2000:] += 0.2
    images = Images((255 * x.clamp(0, 1)).to(torch.uint8), torch.arange(4000) // 2000, "made up")
    seeds = gc.class_seeds(images, 1, 3000)
    own = images.take(torch.arange(2000, 4000))
    assert seeds.shape == (3000, 1, 2, 2) and torch.allclose(seeds.mean(0), own.mean(0), atol=0.02)
    assert torch.allclose(seeds.std(0), (own.var(0) + 1e-4).sqrt(), atol=0.01)


def test_images_are_made_like_their_class_in_no_ball(run):
    net, x, k = Linear(torch.eye(3)), torch.full((2, 1, 1, 3), 0.5), torch.tensor([0, 2])
    made = gc.make_like(run, net, x, k, 3, 0.1)
    assert made.flatten(1)[0].tolist() == pytest.approx([0.8, 0.5, 0.5]) and made.flatten(1)[1].tolist() == pytest.approx([0.5, 0.5, 0.8])


def test_integrated_gradients_are_complete(exact):
    d, x, k = small_d(), torch.rand(4, *SHAPE), torch.tensor([0, 1, 2, 1])
    shares = gc.integrated_gradients(d, x, k, 400)
    whole = gc.own_logit(d(x), k) - gc.own_logit(d(0 * x), k)
    assert torch.allclose(shares.flatten(1).sum(1), whole, atol=0.01 * whole.abs().max().item() + 1e-4)
    W = torch.randn(3, 784)
    assert torch.allclose(gc.integrated_gradients(Linear(W), x, k).flatten(1), x.flatten(1) * W[k], atol=1e-4)


def test_integrated_gradients_of_captum(exact):
    captum = pytest.importorskip("captum.attr")
    d, x, k = small_d(), torch.rand(3, *SHAPE), torch.tensor([0, 1, 2])
    theirs = captum.IntegratedGradients(d).attribute(x, torch.zeros_like(x), k, n_steps=200, method="riemann_middle")
    assert torch.allclose(gc.integrated_gradients(d, x, k, 200), theirs.float(), atol=1e-4)


# --- tables and figures ---


@pytest.fixture
def nets():
    return {"generative": gc.Generative(small_d(10), torch.zeros(10)), "softmax": common.make_net("mnist_cnn", 10, SHAPE, 0.05).eval()}


def test_table_3_14_joins_the_attacks_image_by_image(run, monkeypatch, nets):
    test = some_images()
    x, y = test.some(6)
    for name, net in nets.items():  # labels that both read rightly, but for the first image
        monkeypatch.setattr(type(net), "forward", lambda self, x, y=y: F.one_hot(y[: len(x)], 10) * (2 - x.amax()))

    def natural(net, x, y):  # the source's attack, which adds 1, breaks the last image; the first is misread before it alone
        attacked = x.min().item() >= 1
        return torch.tensor([attacked] + [True] * (len(x) - 2) + [not attacked])
    monkeypatch.setattr(gc, "natural", natural)
    broken = {loss: torch.arange(6) == i + 1 for i, (loss, _) in enumerate(gc.ATTACKS.values())}
    calls = []

    def unbroken(run, net, x, y, K, still, loss, each, a):
        assert still.tolist() == [False] + [True] * 5  # of images read rightly
        calls.append((net, K, each, a))
        return still & ~broken[loss]
    monkeypatch.setattr(gc, "unbroken", unbroken)
    monkeypatch.setattr(gc, "source_attack", lambda run, net, x, y, a: x + 1)
    s = replace(SMOKE, images=6, eps=2.0, test_steps=5)
    rows = {row["quantity"]: row["value"] for row in gc.table_3_14(run, s, test, nets, 10)}
    for name, net in nets.items():
        assert rows[f"natural acc, {name}"] == pytest.approx(5 / 6)
        for title in gc.ATTACKS:
            assert rows[f"robust acc, {name}, {title}"] == pytest.approx(4 / 6)
        assert rows[f"robust acc, {name}, source's attack"] == pytest.approx(4 / 6)
        assert rows[f"robust acc, {name}, worst"] == 0  # one image is left by the four, and falls to the source's
        assert rows[f"AUROC of the largest output, {name}"] == 1  # clean ones are higher
    assert [call[0] for call in calls] == [nets["generative"]] * 4 + [nets["softmax"]] * 4
    assert {call[1:] for call in calls} == {(10, each, gc.Radius(2.0, 5, 0.2)) for each in (False, True)}


def test_figure_3_7(run, monkeypatch, nets):
    """Attacks share their survivors, also from radius to radius; the source's attack starts afresh."""
    seen, n = [], 6

    def unbroken(run, net, x, y, K, still, loss, each, a):
        seen.append((net, a.eps, loss, still.sum().item()))
        return still & (torch.arange(n) != len(seen) % 20) if loss is gc.margin_attack else still
    monkeypatch.setattr(gc, "unbroken", unbroken)
    monkeypatch.setattr(gc, "natural", lambda net, x, y: torch.tensor([x.mean() < 2] * n) & (x[:, 0, 0, 0] != 3))
    monkeypatch.setattr(gc, "source_attack", lambda run, net, x, y, a: x.clone().index_fill_(0, torch.tensor(5), 3.0) if a.eps == 4 else x)
    rows = gc.figure_3_7(run, replace(SMOKE, eps=2.0, few=n), some_images(), nets, 10)
    radii = [1, 2, 3, 4, 6]
    assert [(net, eps, loss) for net, eps, loss, _ in seen] == [
        (net, eps, loss) for net in nets.values() for eps in radii for loss, _ in gc.ATTACKS.values()
    ]
    assert [row["eps"] for row in rows[:12]] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 6, 6]
    assert [still for *_, still in seen[:20]] == [6, 6, 5, 5, 5, 5] + [5] * 10 + [4] * 4
    by_source = [row["value"] for row in rows[:12] if row["quantity"] == "robust acc, generative, source's attack"]
    assert by_source == [pytest.approx(v) for v in (1, 1, 1, 1, 5 / 6, 1)]
    worst = [row["value"] for row in rows[:12] if row["quantity"] == "robust acc, generative, worst"]
    assert worst == [pytest.approx(v) for v in (1, 5 / 6, 5 / 6, 5 / 6, 4 / 6, 4 / 6)]


def test_counterfactuals_are_judged_by_the_other(run, monkeypatch, nets):
    judged = []
    monkeypatch.setattr(gc, "make_like", lambda run, net, x, k, steps, step: (x + list(nets.values()).index(net)).clamp(0, 1))
    monkeypatch.setattr(gc, "natural", lambda net, x, k: judged.append((net, x.mean().item() == 1, k)) or k > 4)
    rows = gc.figure_3_9(run, SMOKE, some_images(), nets, 10)
    asked = torch.arange(10).repeat(5) != some_images().some(5)[1].repeat_interleave(10)
    for row in rows:  # of 50 pictures five are of their own class, and do not count
        assert row["n"] == 45 and row["value"] == pytest.approx((asked & (torch.arange(10).repeat(5) > 4)).sum().item() / 45)
    (first, white, k), (second, whiter, _) = judged
    assert first is nets["softmax"] and not white and second is nets["generative"] and whiter
    assert k.tolist() == list(range(10)) * 5 and set(run.shown["figure3.9"]) == {"test images", *nets}
    shown = run.shown["figure3.9"]
    assert shown["softmax"].min() == 1 > shown["generative"].min()  # what each made
    drawn = []
    monkeypatch.setattr(gc, "class_seeds", lambda images, k, n: drawn.append(k) or torch.rand(n, *SHAPE))
    gc.figure_3_8(run, SMOKE, some_images(200), nets, 10)
    assert judged[-1][2].tolist() == [k for k in range(10) for _ in range(4)] and drawn == list(range(10))


def test_more_like_a_class_in_no_ball(run):
    net, x = Linear(torch.randn(3, 784)), torch.full((2, *SHAPE), 0.5)
    k = torch.tensor([0, 2])
    made = gc.make_like(run, net, x, k, 3, 1.0)
    assert gc.length(made - x).min() > 2 and (gc.own_logit(net(made), k) > gc.own_logit(net(x), k)).all()


def test_table_3_15(run, monkeypatch, nets):
    made = []
    monkeypatch.setattr(gc, "make_like", lambda run, net, x, k, steps, step: made.append((net, steps, step, k)) or x)
    rows = gc.table_3_15(run, replace(SMOKE, samples=20, seed_step=0.5), some_images(200), some_images(50), nets, ("FD-cls", len), 10)
    assert [row["quantity"] for row in rows[:3]] == ["FD-cls seeds", "FD-cls samples, generative", "FD-cls counterfactuals, generative"]
    assert rows[-1]["quantity"] == "FD-cls held-out data" and [row.get("steps") for row in rows] == [None, 7, 7, 10, 10] + [7, 7, 10, 10, None]
    assert [(net, steps, step) for net, steps, step, _ in made] == [(net, steps, 0.5) for net in nets.values() for steps in (7, 7, 10, 10)]
    y = some_images(50).some(20)[1]
    assert made[0][3].tolist() == [k for k in range(10) for _ in range(2)] and not (made[1][3] == y).any()


def test_table_3_16_and_3_17(run):
    d, c = small_d(10), torch.tensor([100.0] + [0.0] * 9)
    rows = {row["quantity"]: row["value"] for row in gc.table_3_16(some_images(), some_images(50, 3), d, c)}
    assert rows["train acc, after calibration"] == rows["test acc, after calibration"] == 0.1  # all are read as class 0
    x, y = some_images(50, 3).some(50)
    assert rows["test acc, before calibration"] == pytest.approx((d(x).argmax(1) == y).float().mean().item())
    assert [row["value"] for row in gc.table_3_17(c)] == c.tolist()


def test_figure_3_11_holds_each_d_k_against_its_own_class(run, monkeypatch):
    test = some_images(60)
    x, y = test.some(2000)
    z = torch.randn(60, 10)
    monkeypatch.setattr(gc, "logits_of", lambda net, images: z)
    panels = {}
    monkeypatch.setattr(run, "histograms", lambda name, shown: panels.update(shown), raising=False)
    rows = gc.figure_3_11(run, test, "d")
    assert list(panels) == ["d_1", "d_2", "d_3"]
    for k, row in enumerate(rows):
        own, others = z[y == k, k], z[y != k, k]
        assert row["value"] == pytest.approx(gc.auroc(own, others)) and (row["positive"], row["n"]) == (len(own), len(others))
        assert row["interval"] == common.bootstrap(gc.auroc, own, others) and row["interval"][0] < row["value"] < row["interval"][1]
        shown = panels[f"d_{k + 1}"]
        assert torch.equal(shown["its class"], own) and torch.equal(shown["others"], others)


def test_an_ablation_attacks_both_sides(run, monkeypatch):
    train, test, asked = some_images(), some_images(80, 4), []
    d = small_d(3)
    monkeypatch.setattr(gc, "train_d", lambda run, s, name, images, classes: asked.append((s, name, images, list(classes))) or d)
    s = replace(SMOKE, few=5, eps=0.5, test_steps=4, ablation=7, updates=99)
    clean, attacked = gc.effect(run, s, train, test, "name", "title", width=3)
    (changed, name, images, classes), = asked
    assert changed.updates == 7 and name == "name" and images is train and classes == [0, 1, 2]
    assert clean["quantity"] == "standard AUC, title" and attacked["quantity"] == "adversarial AUC, title" and clean["width"] == 3
    own, others = gc.lists_of(test, range(3))
    areas = []
    for k in range(3):
        x = test.take(own[k][common.batch_index(len(own[k]), 5, 3 + 100 * k, 0)])
        x_out = test.take(others[k][common.batch_index(len(others[k]), 5, 4 + 100 * k, 0)])
        areas.append(gc.auroc(d(x)[:, k], d(x_out)[:, k]))
    assert clean["value"] == pytest.approx(sum(areas) / 3) and attacked["value"] < clean["value"]
    sides, real = [], gc.repeat

    def repeat(step, x, steps, net, x0, a, sign):
        sides.append((steps, a, sign))
        return real(step, x, steps, net, x0, a, sign)
    monkeypatch.setattr(gc, "repeat", repeat)
    gc.effect(run, s, train, test, "name", "title")
    a = gc.Radius(0.5, 4, 0.05)  # the data down, the others up
    assert sides == [(0, a, 1), (0, a, -1), (4, a, 1), (4, a, -1)]
    (one, *_) = [common.make_net("mnist_cnn", 1, SHAPE, 0.05)]
    assert clean["parameters"] == attacked["parameters"] == sum(p.numel() for p in one.parameters())


def test_ablations_change_what_they_say(run, monkeypatch):
    asked = []
    monkeypatch.setattr(gc, "effect", lambda run, s, train, test, name, title, **_: asked.append((s, name, title)) or [])
    monkeypatch.setattr(run, "lines", lambda *a, **b: None)
    s, images = replace(SMOKE, width=1.0, eps_out=1.5), some_images()
    gc.figure_3_12(run, s, images, images)
    assert [(t.width, t.weight_decay) for t, *_ in asked] == [(w, decay) for decay in (0.0, 1e-4) for w in (1, 1.5, 2, 3)]
    asked.clear()
    gc.figure_3_13(run, s, images, images)
    assert [t.eps_out for t, *_ in asked] == pytest.approx([0, 0.5, 1, 1.5, 2.5])
    asked.clear()
    gc.figure_3_14(run, s, images, images)
    assert [t.augment for t, *_ in asked] == ["none", "crop", "mixup", "cutmix"]  # the policy of auto is for colours
    asked.clear()
    gc.figure_3_15(run, s, images, images)
    assert [(t.eps_in, title) for t, _, title in asked] == [(0, "(3.39)"), (1.5, "(3.45)")]
    assert len({name for _, name, _ in asked}) == 2


# --- the script ---


@pytest.mark.parametrize("calibrate", ["validation", "test"])
def test_main_keeps_the_splits_apart(tmp_path, monkeypatch, calibrate):
    made, asked = {}, {}
    d = small_d(10)
    monkeypatch.setattr(gc, "train_d", lambda run, s, name, train, classes, extra: asked.update(d=train, classes=list(classes), extra=extra) or d)
    monkeypatch.setattr(gc, "calibrate", lambda d, images: asked.update(c=images) or torch.ones(10))
    monkeypatch.setattr(common, "train_classifier", lambda run, name, build, train, *a, **b: asked.update(softmax=train, given=a, **b) or name)
    monkeypatch.setattr(common.Run, "experiments", lambda self, registry, **have: made.update(have))
    gc.main(["--out", str(tmp_path), "--device", "cpu", "--calibrate", calibrate, "--auxiliary", "letters",
             "--soft-eps", "0.7", "--soft-updates", "9", "--soft-batch", "5"])
    nets = made["nets"]()
    assert isinstance(nets["generative"], gc.Generative) and nets["softmax"] == "softmax"
    assert len(made["test"]) == 2000 and asked["classes"] == list(range(10)) and asked["extra"].name == "letters"
    assert asked["d"] is asked["softmax"] is made["train"]
    assert nets["generative"].c.tolist() == [1] * 10 and asked["given"] == (9, 5)
    a = gc.Radius(0.7, 10, 0.7 / 5)
    assert asked["adversary"].func is gc.adversary and asked["adversary"].keywords["a"] == a and asked["made_from"] == {"attack": a}
    if calibrate == "test":
        assert asked["c"] is made["test"]
    else:
        assert len(asked["c"]) + len(asked["d"]) == 10_000
        seen = {image.tobytes() for image in asked["c"].x.numpy()}
        assert not any(image.tobytes() in seen for image in asked["d"].x[:500].numpy())


def test_smoke_run_of_every_experiment(tmp_path, outcome, narrow):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu")
    assert outcome(gc, *flags, "--only", *gc.EXPERIMENTS) == (0, "")
    folder = tmp_path / "gen_classify-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(gc.EXPERIMENTS)
    for name, entry in results.items():
        for row in entry["rows"]:
            assert math.isfinite(row["value"]), (name, row)
    assert {p.stem for p in folder.glob("*.png")} == {"figure3.7", "figure3.8", "figure3.9", "figure3.10", "figure3.11", "figure3.12", "figure3.13"}
    code, err = outcome(gc, *flags, "--eps-out", "0.7")
    assert code == 2 and "d.pt" in err and err.count("\n") == 1


def test_smoke_run_on_colour(tmp_path, write_npz, outcome, narrow):
    data = write_npz("cifar10", n=90)
    flags = ("--dataset", "cifar10", "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu")
    assert outcome(gc, *flags, "--width", "0.0625", "--soft-width", "0.0625",
                   "--only", "table3.14") == (0, "")


@pytest.mark.parametrize("flags, says", [
    (("--augment", "auto"), "--augment"), (("--augment", "flip"), "--augment"), (("--calibrate", "train"), "--calibrate"),
    (("--eps", "0"), "--eps"), (("--images", "1"), "--images"), (("--batch", "0"), "--batch"), (("--auxiliary", "nothing"), "nothing"),
    (("--eps-in", "-1"), "--eps-in"), (("--test-steps", "0"), "--test-steps")])
def test_bad_input_is_one_line(tmp_path, outcome, flags, says):
    code, err = outcome(gc, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
