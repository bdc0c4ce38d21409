"""lifecycle_midrun.py: Algorithm 4, the score chain, tasks and their verdicts, and the script as a whole."""
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import common
import lifecycle_midrun as lm
from common import Diverged, UserError
from lifecycle_midrun import Defence, Sampler, Score, Task, dice


def lab_of(tmp_path, *flags, name="runs"):
    argv = ["--budget", "smoke", "--out", str(tmp_path / name), "--device", "cpu", *map(str, flags)]
    return lm.Lab(lm.get_args(argv))


class Counting:
    """In place of Sampler: adds one to every state it is given."""

    def __init__(self, V, tau, temperature, graph=True):
        self.tau, self.temperature = tau, temperature

    def follow(self):
        pass

    def __call__(self, x, steps):
        return x + 1, torch.tensor(0.1)


class Killed(Exception):
    pass


# --- Algorithm 4 ---


def test_the_bank_is_replaced_at_the_rate_p_and_ages_follow_the_geometric_law():
    p, n, visits, torch_rand = 0.1, 64, 3000, torch.rand
    bank, age, replaced, ages = torch.zeros(n, 1), torch.zeros(n, dtype=torch.long), 0, []
    for t in range(visits):
        place = common.batch_index(n, 16, 0, t)
        age[place] += 1
        before = age.clone()
        lm.rejuvenate(bank, age, place, p, lambda new: torch_rand(len(new), 1))
        replaced += int((age != before).sum())
        if t > 500:
            ages.append(age.float().mean().item())
    draws = visits * 16
    assert abs(replaced - p * draws) < 4 * math.sqrt(draws * p * (1 - p))
    mean = (1 - p) / p                                                          # of p (1 - p)^k
    assert sum(ages) / len(ages) == pytest.approx(mean, rel=0.05)


def test_only_the_drawn_places_are_replaced():
    bank, age, place = torch.arange(10.0)[:, None], torch.full((10,), 7), torch.tensor([1, 4, 8])
    for p, fresh in ((0, []), (1, [1, 4, 8])):
        lm.rejuvenate(bank, age, place, p, lambda new: -new[:, None].float())
        assert torch.nonzero(age == 0)[:, 0].tolist() == fresh
        assert torch.nonzero(bank[:, 0] != torch.arange(10.0))[:, 0].tolist() == fresh
    assert bank[4].item() == -4


@pytest.mark.parametrize("p", [0, 1])
def test_rows_of_the_bank_are_overwritten_at_the_drawn_indices(tmp_path, monkeypatch, p):
    monkeypatch.setattr(lm, "Sampler", Counting)
    lab = lab_of(tmp_path, "--updates", 1, "--p", p, "--save-every", 1)
    served = []
    monkeypatch.setattr(lab, "fresh", lambda n: served.append(torch.full((n, 1, 28, 28), 10.0 * (len(served) + 1)))
                        or served[-1])
    V, age, _ = lm.train_midrun(lab)
    bank = torch.load(lab.run.folder / "energy.pt", weights_only=True)["bank"]
    place = common.batch_index(8, 4, 1, 0)
    assert [len(x) for x in served] == [8, 4][:1 + p]
    expected = torch.full((8,), 10.0)
    expected[place] = 20.0 if p else 11.0                                       # fresh, or one step on
    assert torch.equal(bank, expected.view(8, 1, 1, 1).expand_as(bank))
    assert age[place].tolist() == [0 if p else lab.s.k_train] * 4 and age.sum() == (0 if p else 4 * lab.s.k_train)


def test_rates_change_at_a_third_a_half_two_thirds_and_five_sixths(tmp_path, monkeypatch):
    rates = {it: lm.annealed(it, 150_000) for it in (1, 50_000, 50_001, 75_000, 75_001, 100_000, 100_001, 125_000,
                                                      125_001, 150_000)}
    assert list(rates.values()) == pytest.approx([1, 1, .1, .1, .01, .01, .001, .001, .0001, .0001])
    seen, step = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, *a: seen.append(self.param_groups[0]["lr"]) or
                        step(self, *a))
    lab = lab_of(tmp_path, "--updates", 6, "--lr", 0.001)
    lm.train_midrun(lab)
    assert seen == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
    seen.clear()
    lm.train_midrun(lab, "flat", anneal=False)
    assert seen == [.001] * 6


def test_the_loss_lowers_the_energy_of_data_and_raises_that_of_chains(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, "Sampler", Counting)                                # chains: images plus one, and more
    lab = lab_of(tmp_path, "--updates", 30, "--lr", 1e-3, "--width", 0.125)
    V = lm.train_midrun(lab)[0]
    x = lab.images(slice(0, 20))
    assert V(x).mean() < V(x + 1).mean()


def test_tandem_states_are_what_the_generator_makes_of_their_latents(tmp_path, monkeypatch):
    seen = []

    class Watching(Counting):
        def __call__(self, x, steps):
            if steps == 2 and len(x) == 4:
                seen.append(x.clone())
            return x, torch.tensor(0.1)
    monkeypatch.setattr(lm, "Sampler", Watching)
    lab = lab_of(tmp_path, "--updates", 1, "--save-every", 1)
    V, age, G = lm.train_midrun(lab, "short", tandem=True, p=0)
    state = torch.load(lab.run.folder / "short.pt", weights_only=True)
    torch.manual_seed(0)
    common.make_net("light_ebm", 1, (1, 28, 28), lab.s.width)
    first = common.make_net("sngan_generator", 1, (1, 28, 28), lab.s.g_width)
    assert torch.allclose(first(state["z"]), state["bank"], atol=1e-5)          # nothing moved, none replaced
    moved = [k for k, v in G.state_dict().items() if not torch.equal(v, first.state_dict()[k]) and "weight" in k]
    assert moved                                                                # and yet G has learned
    assert not G.training


def test_a_replaced_state_gets_a_latent_of_its_own(tmp_path, monkeypatch):
    class Still(Counting):
        def __call__(self, x, steps):
            return x, torch.tensor(0.1)
    monkeypatch.setattr(lm, "Sampler", Still)
    kept = {}
    for p in (0, 1):
        lab = lab_of(tmp_path, "--updates", 1, "--save-every", 1, name=f"p{p}")
        lm.train_midrun(lab, "short", tandem=True, p=p)
        kept[p] = torch.load(lab.run.folder / "short.pt", weights_only=True)
    place = common.batch_index(8, 4, 1, 0)
    changed = (kept[0]["z"] != kept[1]["z"]).any(1)
    assert torch.nonzero(changed)[:, 0].tolist() == sorted(place.tolist())
    assert torch.equal((kept[0]["bank"] != kept[1]["bank"]).flatten(1).any(1), changed)


class Fill(nn.Module):
    """A generator of one weight: images filled with weight times the first latent."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, z):
        return (self.weight * z[:, :1])[..., None, None].expand(-1, 1, 28, 28)


def test_the_generator_in_tandem_goes_where_its_own_states_went(tmp_path, monkeypatch):
    """States that stay give no gradient, if each is held against what its own latent makes."""
    made, weights = common.make_net, []
    monkeypatch.setattr(common, "make_net", lambda name, *a: Fill() if name == "sngan_generator" else made(name, *a))
    for moved in (1.0, 2.0):
        class Scaling(Counting):
            def __call__(self, x, steps):
                return moved * x, torch.tensor(0.1)
        monkeypatch.setattr(lm, "Sampler", Scaling)
        lab = lab_of(tmp_path, "--updates", 1, name=f"m{moved}")
        weights.append(lm.train_midrun(lab, "short", tandem=True, p=0)[2].weight.item())
    assert weights[0] == 1 and weights[1] == pytest.approx(1 + 1e-4, abs=1e-6)  # Adam's first step, upwards


@pytest.mark.parametrize("tandem", [False, True])
def test_interrupted_training_goes_on_bit_exactly(tmp_path, monkeypatch, tandem):
    flags = ("--updates", 7, "--save-every", 2, "--log-every", 3, "--p", 0.3)
    whole = lm.train_midrun(lab_of(tmp_path, *flags, name="whole"), tandem=tandem)
    calls = []

    class Dying(Sampler):
        def __call__(self, x, steps):
            calls.append(steps)
            if steps == 2 and calls.count(2) == 1 + stop:   # one more: the warm-up of the estimate
                raise Killed
            return super().__call__(x, steps)
    monkeypatch.setattr(lm, "Sampler", Dying)
    for stop in (3, 4):                                     # at update 3, then at update 6
        calls.clear()
        with pytest.raises(Killed):
            lm.train_midrun(lab_of(tmp_path, *flags, name="broken"), tandem=tandem)
    monkeypatch.undo()
    torch.manual_seed(99)
    broken = lm.train_midrun(lab_of(tmp_path, *flags, name="broken"), tandem=tandem)
    states = [torch.load(tmp_path / name / "lifecycle_midrun-glyphs" / "energy.pt", weights_only=True)
              for name in ("whole", "broken")]
    for key in {"V", "bank", "age", "G", "z"} & set(states[0]):
        pairs = zip(states[0][key].values(), states[1][key].values()) if key in "VG" else [(states[0][key],
                                                                                         states[1][key])]
        assert all(torch.equal(a, b) for a, b in pairs), key
    assert torch.equal(whole[1], broken[1])
    plain = [[{k: v for k, v in row.items() if k != "seconds"} for row in state["rows"]] for state in states]
    assert plain[0] == plain[1]


def test_the_generator_and_the_score_resume_too(tmp_path, monkeypatch):
    for train, count in ((lm.train_generator, "batches"), (lm.train_score, "batches")):
        flags = ("--g-iters", 4, "--s-iters", 4, "--save-every", 2)
        whole = train(lab_of(tmp_path, *flags, name=f"whole{train.__name__}"))
        real, step = common.batches, torch.optim.Adam.step
        calls = []

        def dying(self, *a):
            calls.append(1)
            if len(calls) > (9 if train is lm.train_generator else 3):          # in the fourth update
                raise Killed
            return step(self, *a)
        monkeypatch.setattr(torch.optim.Adam, "step", dying)
        with pytest.raises(Killed):
            train(lab_of(tmp_path, *flags, name=f"broken{train.__name__}"))
        monkeypatch.undo()
        torch.manual_seed(99)
        broken = train(lab_of(tmp_path, *flags, name=f"broken{train.__name__}"))
        a, b = (getattr(net, "net", net).state_dict() for net in (whole, broken))
        assert all(torch.equal(a[k], b[k]) for k in a), train.__name__


def test_another_temperature_or_noise_is_refused(tmp_path, outcome):
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", "figure3.2")
    assert outcome(lm, *flags) == (0, "")
    for flag, value in (("--temperature", "2e-4"), ("--tau-train", "0.01")):
        code, err = outcome(lm, *flags, flag, value)
        assert code == 2 and flag[2:].replace("-", "_") in err and "energy.pt" in err and err.count("\n") == 1


def test_the_defence_has_a_tau_of_its_own_and_the_temperature_of_training(tmp_path, monkeypatch):
    made = []

    class Spy(Counting):
        def __init__(self, V, tau, temperature, **how):
            made.append((tau, temperature))
            super().__init__(V, tau, temperature)
    monkeypatch.setattr(lm, "Sampler", Spy)
    lab = lab_of(tmp_path, "--tau", 0.002, "--tau-train", 0.004)
    lab.sampler
    assert made == [(0.004, lab.s.temperature), (0.002, lab.s.temperature)]


def test_runaway_chains_stop_training_with_advice(tmp_path):
    with pytest.raises(Diverged, match="lower --lr"):
        lm.train_midrun(lab_of(tmp_path, "--lr", 10.0, "--updates", 40), anneal=False)


def test_training_the_energy_leaves_the_generator_alone(tmp_path):
    lab = lab_of(tmp_path, "--rejuvenate", "generator")
    x = lab.fresh(5)
    before = {k: v.clone() for k, v in lab.generator.state_dict().items()}
    lm.train_midrun(lab)
    assert x.shape == (5, 1, 28, 28) and 0 <= x.min() and x.max() <= 1
    assert not lab.generator.training and not any(p.requires_grad for p in lab.generator.parameters())
    assert all(torch.equal(v, before[k]) for k, v in lab.generator.state_dict().items())


def test_the_generator_learns_where_the_data_are_bright(tmp_path):
    """White left halves: hinge losses with the right signs move G there, and D tells the two apart."""
    lab = lab_of(tmp_path, "--g-iters", 120, "--batch", 8, "--bank", 8, "--g-width", 0.125, "--log-every", 120)
    white = torch.zeros(16, 1, 28, 28, dtype=torch.uint8)
    white[..., :14] = 255
    lab.data = common.Images(white, torch.zeros(16), "halves")
    with torch.no_grad():
        x = lm.train_generator(lab)(torch.randn(32, 128))
    assert x[..., :14].mean() > x[..., 14:].mean() + 0.2
    row = torch.load(lab.run.folder / "generator.pt", weights_only=True)["rows"][-1]
    assert row["real"] > row["fake"]


# --- the score's chain ---


def test_the_score_chain_samples_a_known_gaussian():
    """S = -(x - mu) / s^2, whose sign the print lost: from afar to mean mu, variance s^2 / (1 - eta^2 / 4 s^2)."""
    mu, s, sigma = 0.3, 0.01, 0.01
    chain = Score(lambda x: -(x - mu) / s ** 2 * sigma, sigma)
    x, _ = chain(torch.full((4000, 1, 2, 2), 0.9), 200)
    n, variance = x.numel(), s ** 2 / (1 - chain.eta ** 2 / (4 * s ** 2))
    assert abs(x.mean().item() - mu) < 5 * s / math.sqrt(n)
    assert x.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / n))


def test_score_matching_learns_the_score_of_a_point(tmp_path):
    """Data that are one grey image: the score at x + sigma z is -z / sigma; the net returns -z."""
    lab = lab_of(tmp_path, "--s-iters", 300, "--s-width", 0.5, "--sigma", 0.3, "--batch", 8, "--log-every", 150)
    lab.data = common.Images(torch.full((8, 1, 28, 28), 128, dtype=torch.uint8), torch.zeros(8), "grey")
    net, z = lm.train_score(lab).net, torch.randn(4, 1, 28, 28)
    found = net(128 / 255 + 0.3 * z)
    assert (found + z).pow(2).mean() < 0.5 and (found * z).mean() < -0.4


# --- tasks and their verdicts ---


def test_dice_against_a_hand_count():
    """Three rows of four pixels: TP 3, FP 1, FN 1; a wrong class is both; empty masks give 0."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])[None]
    found = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]])[None]
    assert dice(found, mask).item() == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert dice(2 * found, 2 * mask).item() == pytest.approx(0.75)
    assert dice(2 * found, mask).item() == 0
    half = torch.where(torch.arange(4) < 1, 2 * found, found)                   # one hit gets a wrong class
    assert dice(half, mask).item() == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    assert dice(torch.zeros_like(mask), torch.zeros_like(mask)).item() == 0


def test_dice_is_the_f1_score_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    found, mask = torch.randint(0, 4, (2, 5, 9, 9))
    theirs = [metrics.f1_score(m.flatten(), f.flatten(), labels=[1, 2, 3], average="micro")
              for f, m in zip(found, mask)]
    assert torch.allclose(dice(found, mask), torch.tensor(theirs, dtype=torch.float32), atol=1e-6)
    theirs = [metrics.f1_score((m > 1).flatten(), (f > 1).flatten()) for f, m in zip(found, mask)]
    assert torch.allclose(dice((found > 1).long(), (mask > 1).long()), torch.tensor(theirs, dtype=torch.float32),
                          atol=1e-6)


class Threshold(nn.Module):
    """Ink where a pixel is above one half: logits [B, 2, S, S]."""

    def __init__(self):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.cat([0.5 - x, x - 0.5], 1) + self.zero


DATA = SimpleNamespace(name="made up")


def fake_lab(tmp_path, **changes):
    s = dataclasses.replace(lm.SETTINGS["glyphs"]["smoke"], **changes)
    return SimpleNamespace(s=s, run=SimpleNamespace(folder=tmp_path), made_with={"seed": 0},
                           args=SimpleNamespace(seed=0, budget="quick"))


def test_a_segmentation_is_right_at_half_its_clean_dice_and_empty_ones_are_counted_apart(tmp_path):
    x = torch.zeros(3, 1, 4, 4)
    x[0, 0, 0], x[1, 0, :2] = 1, 1                                              # found: a row; two rows; nothing
    masks = torch.zeros(3, 4, 4, dtype=torch.long)
    masks[0, 0], masks[1, 0], masks[2, 0] = 1, 1, 1                             # true: a row each
    task = Task(fake_lab(tmp_path), "m", Threshold(), x, masks, DATA)
    assert task.apart == 1 and len(task.x) == len(task.y) == 2
    assert task.clean.tolist() == pytest.approx([1, 2 / 3])
    found = torch.zeros(2, 4, 4, dtype=torch.long)
    found[:, 0, :1] = 1                                                         # Dice 2 / 5
    assert task.right(found, torch.tensor([0, 1])).tolist() == [False, True]
    assert task.right(found[:1], torch.tensor([1])).tolist() == [True]
    with pytest.raises(Diverged, match="u-iters"):
        Task(fake_lab(tmp_path), "m", Threshold(), x[2:], masks[2:], DATA)


def test_labels_are_right_when_they_are_equal(tmp_path):
    task = Task(fake_lab(tmp_path), "c", None, torch.rand(3, 1, 4, 4), torch.tensor([4, 5, 6]), DATA)
    assert task.right(torch.tensor([5, 5]), torch.tensor([1, 2])).tolist() == [True, False]
    assert task.right(torch.tensor([4, 5, 0]), slice(3)).tolist() == [True, True, False]


def test_an_attack_on_another_task_is_refused(tmp_path):
    x, y = torch.zeros(2, 1, 4, 4), torch.ones(2, 4, 4, dtype=torch.long)
    x[:, 0, :2] = 1
    lab = fake_lab(tmp_path, images=2, n=1, restarts=1)
    for data, refused in (("one", False), ("one", False), ("two", True)):
        task = Task(lab, "m", Threshold(), x, y, SimpleNamespace(name=data))
        if refused:
            with pytest.raises(UserError, match="task one .now two"):
                lm.algorithm_1(task, "a", Defence(task.f))
        else:
            lm.algorithm_1(task, "a", Defence(task.f))


def test_eot_of_a_segmentation_averages_logits_pixel_by_pixel(monkeypatch):
    monkeypatch.setattr(common, "bfloat16_units", lambda device: False)
    torch.manual_seed(0)
    f, x = common.UNet(4, 3, 1).eval(), torch.rand(2, 1, 8, 8)
    y, shifts = torch.randint(0, 3, (2, 8, 8)), torch.tensor([-0.1, 0.0, 0.2])

    def sampler(z, steps):                                                      # chain h of image b: row h * B + b
        return z + shifts.repeat_interleave(2).view(-1, 1, 1, 1), None
    logits, gradient = Defence(f, 1, sampler).gradient(x, y, 3)
    states = [(x + d).requires_grad_(True) for d in shifts]
    mean = torch.stack([f(state) for state in states]).mean(0)
    assert logits.shape == (2, 3, 8, 8) and torch.allclose(logits, mean, atol=1e-5)
    loss = sum(-torch.log_softmax(mean[b, :, i, j], 0)[y[b, i, j]] for b in range(2) for i in range(8)
               for j in range(8))
    each = torch.autograd.grad(loss, states)
    assert torch.allclose(gradient, torch.stack(each).mean(0), atol=1e-5)
    assert torch.equal(Defence(f, 1, sampler).predict(x, 3), mean.argmax(1))


def test_algorithm_3_breaks_a_segmentation_and_keeps_what_broke_it(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "bfloat16_units", lambda device: False)
    x = torch.full((2, 1, 6, 6), 0.1)
    x[0, 0, :3], x[1, 0, :3] = 0.6, 0.95                                        # one within reach, one not
    masks = torch.zeros(2, 6, 6, dtype=torch.long)
    masks[:, :3] = 1
    lab = fake_lab(tmp_path, images=2, eps=0.2, step=0.1, n=3, restarts=1)
    task = Task(lab, "m", Threshold(), x, masks, DATA)
    record, adversary = lm.algorithm_1(task, "a", Defence(task.f))
    assert record[0].tolist() == [True, True] and record[-1].tolist() == [False, True]
    assert dice(Defence(task.f).predict(adversary, 1), masks)[0] < 0.5


def test_table_3_3_is_never_more_robust_than_the_plain_attack(tmp_path, monkeypatch):
    records = {"own-bpda": [[1, 1, 1, 0], [1, 1, 0, 0]], "own-power": [[1, 1, 1, 1], [1, 0, 1, 1]]}
    asked = {}

    def made(task, name, defence, **changes):
        asked[name] = changes
        return torch.tensor(records[name], dtype=torch.bool), None
    monkeypatch.setattr(lm, "algorithm_1", made)
    lab = fake_lab(tmp_path, n=20, h_adv=6, power=4)
    lab.task = SimpleNamespace(x=torch.zeros(4, 1, 1, 1), defence=lambda: None)
    rows = lm.table_3_3(lab)
    assert asked["own-power"] == {"n": 80, "h_adv": 8} and asked["own-bpda"] == {}
    assert rows["robust acc (BPDA+EOT 20 steps x 6)"] == 0.5 and rows["robust acc (80 steps x 8 alone)"] == 0.75
    assert rows["robust acc (BPDA+EOT 80 steps x 8)"] == 0.25 and rows["natural acc"] == 0.75


def test_figure_3_2_holds_the_bank_against_the_law(tmp_path):
    lab = fake_lab(tmp_path, p=0.5, k_train=10, updates=6, batch=4, bank=8)
    lab.energy, lab.run.save = (None, torch.tensor([0, 0, 0, 0, 10, 10, 20, 30]), None), lambda *_: None
    rows = lm.figure_3_2(lab)                                                   # three passes
    assert rows["mean age, steps"] == 70 / 8 and rows["passes over the bank"] == 3
    assert rows["mean age of the law, steps"] == pytest.approx(10 * (0.25 * 1 + 0.125 * 2 + 0.125 * 3))


# --- the script ---


def test_smoke_run_of_every_experiment(tmp_path, outcome):
    code, err = outcome(lm, "--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--only", *lm.EXPERIMENTS)
    assert (code, err) == (0, "")
    folder = tmp_path / "lifecycle_midrun-glyphs"
    results = json.loads((folder / "results.json").read_text())
    assert set(results) == set(lm.EXPERIMENTS)
    for name, entry in results.items():
        for key, value in entry["ours"].items():
            values = value if isinstance(value, list) else [value]
            assert all(isinstance(v, str) or math.isfinite(v) for v in values), (name, key)
            if "acc" in key and not isinstance(value, list):
                low, high = entry["ours"][f"{key}, 95 %"]
                assert 0 <= low <= value <= high <= 1
    for table in ("table3.1", "table4.1", "table4.2"):
        ours = results[table]["ours"]
        attacks = [v for k, v in ours.items() if k.startswith("robust acc (") and not k.endswith("95 %")]
        assert len(attacks) == 4 and ours["robust acc (worst of these)"] == min(attacks)
    for picture in ("table3.1", "table4.1", "table4.2", "figure3.1", "figure3.1-states", "figure3.2", "figure3.3",
                    "figure3.4", "figure3.4-states", "annealing", "rejuvenation-states", "generator"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


@pytest.mark.parametrize("dataset, other", [("cifar10", "cifar100"), ("tinyimagenet", "tinyimagenet")])
def test_smoke_run_on_colour(tmp_path, write_npz, outcome, dataset, other):
    for name in {dataset, other}:
        labels = {f"y_{split}": np.arange(96) % 5 + 98 * (np.arange(96) % 2) for split in ("train", "test")}
        labels = labels if name == "tinyimagenet" else {k: v % 10 for k, v in labels.items()}
        data = write_npz(name, side=64 if name == "tinyimagenet" else 32, **labels)
    flags = ("--dataset", dataset, "--budget", "smoke", "--data-dir", data, "--out", tmp_path, "--device", "cpu",
             "--masks", "glyphs")
    assert outcome(lm, *flags, "--only", "table3.2", "table4.1", "table4.2", "figure3.1") == (0, "")


def test_the_energy_does_not_see_the_classes_of_table_4_1(tmp_path, write_npz):
    data = write_npz("tinyimagenet", side=64, n=200, y_train=np.arange(200), y_test=np.arange(200))
    lab = lab_of(tmp_path, "--dataset", "tinyimagenet", "--data-dir", data, "--only", "table4.1")
    assert sorted(lab.data.y.tolist()) == list(range(100)) and sorted(lab.own.y.tolist()) == list(range(10))
    seen = {tuple(x.flatten()[:50].tolist()) for x in lab.data.x}
    assert not any(tuple(x.flatten()[:50].tolist()) in seen for x in lab.others[0].x) and len(lab.others[0]) == 10


def test_smoke_run_on_a_folder_with_a_pretrained_classifier(tmp_path, outcome, monkeypatch):
    random = np.random.RandomState(0)
    for split, n in (("train", 10), ("val", 8)):
        for i in range(n):
            file = tmp_path / "data" / "imagenet" / split / f"n0{i % 4}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.randint(0, 256, (230, 240, 3), dtype=np.uint8)).save(file)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            self.classifier = nn.Sequential(nn.Dropout(), nn.Linear(4, 1000))

        def forward(self, x):
            return self.classifier(self.features(x))
    monkeypatch.setattr(common.torchvision.models, "get_model", lambda name, weights: Tiny())
    flags = ("--dataset", "imagenet", "--budget", "smoke", "--data-dir", tmp_path / "data", "--out", tmp_path,
             "--device", "cpu")
    assert outcome(lm, *flags, "--only", "table3.2") == (0, "")
    for more in (("--only", "figure3.1"), ("--rejuvenate", "generator")):       # no generator at 224 pixels
        code, err = outcome(lm, *flags, "--fresh", *more)
        assert code == 2 and "sngan_generator" in err


@pytest.mark.parametrize("changes", [("--other", "letters:10-19"), ("--masks", "mnist")])
def test_networks_and_attacks_of_another_task_are_refused(tmp_path, outcome, write_npz, changes):
    data = write_npz("mnist", side=28, colour=False)
    flags = ("--budget", "smoke", "--out", tmp_path, "--device", "cpu", "--data-dir", data, "--only",
             "table4.1" if "other" in changes[0] else "table4.2")
    assert outcome(lm, *flags) == (0, "")
    code, err = outcome(lm, *flags, *changes)
    assert code == 2 and "task" in err


@pytest.mark.parametrize("flags, says", [
    (("--eps", "-1"), "at least 0"), (("--tau", "0"), "above 0"), (("--temperature", "inf"), "finite"),
    (("--bank", "10", "--batch", "4"), "multiple"), (("--last", "500"), "at most --k"), (("--p", "1.5"), "probability"),
    (("--rejuvenate", "noise"), "generator or data"), (("--images", "5000"), "2000"),
    (("--net", "nothing"), "unknown network"), (("--k", "0"), "at least 1"),
    (("--other", "letters:5", "--only", "table4.1"), "NAME:a-b"), (("--classes", "3-2"), "NAME:a-b"),
    (("--masks", "nowhere", "--only", "table4.2"), "unknown data set"),
    (("--other", "flowers", "--only", "table4.1"), "unknown data set"), (("--f-net", "none"), "unknown network"), (("--only", "figure9"), "unknown experiment")])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, outcome, flags, says):
    code, err = outcome(lm, "--budget", "smoke", "--out", tmp_path / "out", "--device", "cpu", *flags)
    assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_settings_are_the_published_ones():
    s, big = lm.PAPER, lm.IMAGENET
    assert (s.updates, s.batch, s.k_train, s.lr, s.p, s.bank, s.temperature) == (150_000, 128, 100, 1e-4, .05, 24_960,
                                                                               1e-4)
    assert s.k_train / s.p == s.k == 2000                                       # p = K / K_def
    assert (2 * s.tau_train, 2 * s.tau, 2 * s.data_noise) == (.0125, .01, .025)
    assert (s.h_adv, s.h_def, s.n, s.eps, s.step) == (48, 128, 50, 8 / 255, 2 / 255)
    assert (big.batch, big.bank, big.k, big.h_adv, big.h_def, big.eps, big.step) == (64, 9984, 200, 24, 64, 2 / 255,
                                                                                   1 / 255)
    assert (2 * big.tau, 2 * big.data_noise, big.temperature) == (.02, .03, 1e-5)
    assert round(4 / 3 * big.h_adv) == 32 and big.power * big.n == 200          # table 3.3
