"""Graders of the exercises of lifecycle_midrun.py."""
import inspect

import torch
from kit import Exercise, Wrong, expect, put, take_out, unchanged

K_TRAIN, P, VISITS = 20, 0.05, 50  # the script's own, for rendered digits; 800 updates of 64 of 1024 states: 50 visits


# --- 1: lives and ages ---


def lives(_, answers):
    """lifecycle_midrun-1: a coin at each visit."""
    said = answers["LIFE"]
    expect(said != 1 / P, f"LIFE: {said} is the mean number of visits; how many steps does a state take at each?")
    expect(abs(said - K_TRAIN / P) < 1,
           f"LIFE: not {said}; how often is a coin thrown on average until it shows death, and how many steps come "
           "before each throw?")
    said, outlive = answers["OUTLIVE"], (1 - P) ** round(1 / P)
    expect(abs(said - 0.5) > 0.01,
           "OUTLIVE: half of the states outlive the median, not the mean; a few very old states pull the mean up")
    expect(abs(said - (1 - outlive)) > 0.01, f"OUTLIVE: {said} is the share that has died by then")
    expect(abs(said - outlive) < 0.01,
           f"OUTLIVE: not {said}; how many throws must a state win to live that long, and with which probability does "
           "it win each?")
    said = answers["AGE"]
    age = K_TRAIN * sum((1 - P) ** visit for visit in range(1, VISITS + 1))
    expect(abs(said - K_TRAIN * VISITS / 2) > 10,
           f"AGE: {said} would be right if nobody ever died and the states had come in one after the other")
    expect(abs(said - K_TRAIN * (1 - P) / P) > 10 and abs(said - K_TRAIN / P) > 10,
           f"AGE: {said} is the mean of an endless training; here a state is visited {VISITS} times, so that the "
           "oldest are not as old as the law allows")
    expect(abs(said - age) < 10,
           f"AGE: not {said}; which share of the states has lived through the last visit, through the last two, "
           "through all 50? Each of these visits has made those states k_train steps older")


# --- 2: Dice ---


def masks(*rows):
    """A mask [4, 4] from four strings of digits."""
    return torch.tensor([[int(pixel) for pixel in row] for row in rows])


TRUE = masks("1100", "0100", "0000", "0000")  # 3 pixels of class 1
MORE = masks("1100", "0110", "0100", "0000")  # TP 3, FP 2
SHIFTED = masks("0100", "0110", "0010", "0000")  # TP 2, FP 2, FN 1
OTHER = masks("2200", "0200", "0000", "0000")  # the right place, the wrong class
HALF = masks("1200", "0100", "0000", "0000")  # TP 2; one pixel in FP and in FN
NONE = masks("0000", "0000", "0000", "0000")
TWO = masks("1111", "1111", "2000", "0000")  # 8 pixels of class 1, one of class 2
BIG = masks("1111", "1111", "0000", "0000")  # finds class 1 alone: TP 8, FN 1


def segmentation(lm, _):
    """lifecycle_midrun-2: Eq. 4.2 and 4.3."""
    found = torch.stack([TRUE, SHIFTED, MORE])
    true = torch.stack([TRUE, TRUE, TRUE])
    score = lm.dice(found, true)
    expect(score.shape == (3,), f"dice of 3 images gives a tensor of shape {tuple(score.shape)}: one number an image")
    first, shifted, more = score.tolist()
    expect(abs(shifted - 2 / 5) > 1e-3, "this is TP / (TP + FP + FN), intersection over union; Dice counts TP twice")
    expect(abs(shifted - 13 / 16) > 1e-3,
           "this is the share of pixels that are right; background is not to count as a hit")
    expect(abs(shifted - 4 / 6) > 1e-3,
           "TP 2, FP 2, FN 1 gives 4 / 6: so it does with FP x FN, which stands in the source's print, a misprint")
    expect(abs(first - 1) < 1e-5, f"a perfect mask has the Dice {first:.3f}")
    expect(abs(shifted - 4 / 7) < 1e-4 and abs(more - 6 / 8) < 1e-4,
           f"TP 2, FP 2, FN 1 gives {shifted:.3f}, TP 3, FP 2, FN 0 gives {more:.3f}; both are in the page. Is a background "
           "pixel a hit?")
    (several,) = lm.dice(BIG[None], TWO[None]).tolist()
    expect(abs(several - 16 / 17) < 1e-4,
           f"TP 8, FN 1 in two classes gives {several:.3f}: count over all classes together, not Dice by Dice")
    wrong_class, half = lm.dice(torch.stack([OTHER, HALF]), true[:2]).tolist()
    expect(wrong_class == 0 and abs(half - 4 / 6) < 1e-4,
           f"ink of a wrong class: Dice is {wrong_class:.3f} where all of it is wrong (should be 0), {half:.3f} where one "
           "pixel of three is (.667); such a pixel is no hit, and counts in FP and in FN")
    (nothing,) = lm.dice(NONE[None], NONE[None]).tolist()
    expect(nothing == 0, f"where neither mask has ink Dice is {nothing}: what is the 1e-9 of Eq. 4.2 for?")
    judge(lm)


LINE, EIGHTH = masks("1111", "0000", "0000", "0000"), masks("1000", "1110", "0000", "0000")  # of 4 pixels one is common
QUARTER = masks("1100", "1100", "0000", "0000")  # two of four are common
BESIDE = masks("0000", "1100", "0000", "0000")  # the other two


def judge(lm):
    """Eq. 4.3 on images whose Dice is known: LINE is the true mask."""
    cases = {  # attacked, clean -> right?
        "Dice 1/4 after the attack, 1/2 before": (EIGHTH, QUARTER, True),
        "Dice 1/4 after the attack, 1 before": (EIGHTH, LINE, False),
        "Dice 1/2 after the attack, 1 before": (QUARTER, LINE, True),
        "Dice 1 after the attack, 1/4 before": (LINE, EIGHTH, True),
        "Dice 0 after the attack, 1/2 before": (BESIDE, QUARTER, False),
        "Dice 0 after the attack, 1/4 before": (2 * EIGHTH, EIGHTH, False)}
    attacked = torch.stack([case[0] for case in cases.values()])
    y = torch.stack([torch.stack([LINE, case[1]]) for case in cases.values()])
    right = lm.Segmenter(None).right(attacked, y)
    expect(right.shape == (6,) and right.dtype == torch.bool,
           f"right() of 6 images gives {right.dtype} of shape {tuple(right.shape)}: one bool an image")
    for (name, case), found in zip(cases.items(), right.tolist()):
        expect(found == case[2],
               f"an image with {name} counts as {'right' if found else 'wrong'}; Eq. 4.3 compares with half of the "
               "same image's own Dice before the attack, and exactly half is right")


def without_dice(source):
    """The bodies of both functions taken out."""
    source = take_out(source, "dice", "lifecycle_midrun-2: Eq. 4.2")
    return take_out(source, "Segmenter.right", "lifecycle_midrun-2: Eq. 4.3")


# --- 3 and 4: the end of a life ---


def bank_of(lm, ages):
    """A bank of states that are all -1, their ages, and 200 training images, each of a brightness of its own."""
    data = lm.Images(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(200), "made up")
    return torch.full((len(ages), 1, 1, 1), -1.0), torch.tensor(ages), data


def born(bank):
    """Which states are new: bool [N]."""
    return bank.flatten(1)[:, 0] != -1


def who_dies(lm, **options):
    """States of the given rows alone, with probability p each; they become images drawn at random, of age 0."""
    rows = torch.tensor([7, 2, 9, 4])
    bank, age, data = bank_of(lm, [40] * 12)
    lm.rejuvenate(bank, age, rows, 1e-9, data, **options)
    expect(not born(bank).any() and (age == 40).all(), "states die although p is next to 0")
    lm.rejuvenate(bank, age, rows, 1.0, data, **options)
    new, zero = born(bank).nonzero()[:, 0].tolist(), (age == 0).nonzero()[:, 0].tolist()
    expect(new or zero, "nobody dies with p = 1: are bank and age changed in place, not copies of them?")
    expect(new == [2, 4, 7, 9] or zero == [2, 4, 7, 9],
           f"rows 7, 2, 9 and 4 of the bank were visited and all die (p = 1), but rows {new} are replaced: the k-th "
           "state of the batch is not the k-th of the bank")
    expect(new == zero, f"rows {new} of the bank are new, but age is 0 in rows {zero}")
    expect(set(age.tolist()) == {0, 40}, "the ages of those who live on must stay as they are")
    values = (255 * bank[rows].flatten()).round()
    expect(((values >= 0) & (values < 200)).all(), "what takes a dead state's place is not a training image")
    shares, counts, early = [], [], []
    for _ in range(30):
        rows = torch.randperm(1500)[:300]
        bank, age, data = bank_of(lm, [40] * 1500)
        lm.rejuvenate(bank, age, rows, 0.3, data, **options)
        visited = born(bank)[rows]
        expect(visited.sum() == born(bank).sum() and torch.equal(born(bank), age == 0),
               "with p = .3 the bank's new states, the ages of 0 and the visited rows no longer belong together")
        shares.append(visited.float().mean().item())
        early.append(visited[:150].float().mean().item())
        counts.append(len(set(bank[rows[visited]].flatten().tolist())) / max(int(visited.sum()), 1))
    expect(max(shares) - min(shares) < 0.5, "either all of a batch die or none: each state has a coin of its own")
    expect(max(shares) - min(shares) > 0.02, "there are always as many deaths: each state has a coin of its own")
    share = sum(shares) / len(shares)
    expect(abs(share - 0.3) < 0.02, f"with p = .3 a share of {share:.2f} of the visited states dies")
    expect(abs(sum(early) / len(early) - 0.3) < 0.04, "whether a state dies depends on its place in the batch")
    images_are_random(lm, options, sum(counts) / len(counts))


def images_are_random(lm, options, different):
    """New states are random training images; different: share of distinct ones among some 90 new states."""
    expect(different > 0.5, "the new states of a batch are nearly all the same training image")
    bank, age, data = bank_of(lm, [40] * 400)
    lm.rejuvenate(bank, age, torch.arange(400), 1.0, data, **options)
    values = (255 * bank.flatten()).round().int()
    expect(values.min() < 20 and values.max() > 180, "only some of the training images ever get into the bank")
    again = (values[:200] == values[200:]).float().mean()
    in_order = (values[1:] == values[:-1] + 1).float().mean()
    expect(max(again, in_order) < 0.2, "new states are the training images in their order, not drawn at random")


def death(lm, _):
    """lifecycle_midrun-3: positions in the batch are not rows of the bank."""
    who_dies(lm)


def wrong_rows(source):
    """rejuvenate takes the place in the batch for the place in the bank."""
    return put(source, "rejuvenate", '''
        def rejuvenate(bank, age, rows, p, data):
            """Alg. 4, last step: with probability p each, states of these rows become training images of age 0."""
            dead = (torch.rand(len(rows)) < p).nonzero()[:, 0]
            if len(dead):
                index = torch.randint(len(data), dead.shape)
                bank[dead] = data.take(index).to(bank.device)
                age[dead] = 0
    ''')


def greatest_age(lm, _):
    """lifecycle_midrun-4: none lives beyond `life` steps."""
    parameters = inspect.signature(lm.rejuvenate).parameters
    expect("life" in parameters, "rejuvenate has no argument named life")
    default = parameters["life"].default
    expect(default is not inspect.Parameter.empty, "life has no default, and train_midrun does not give it")
    for options, given in (({}, "without life"), ({"life": 400}, "with life 400")):
        try:
            who_dies(lm, **options)
        except Wrong as wrong:
            raise Wrong(f"{given} and states of age 40 all must be as it was, but {wrong}") from None
    old_ones_die(lm)


def old_ones_die(lm):
    """Of the visited states those of age 400 and more die for certain, younger ones by the coin."""
    ages = [380, 400, 420, 800, 20, 399, 401, 600]
    rows = torch.tensor([6, 0, 3, 1, 5])  # 401, 380, 800, 400, 399
    bank, age, data = bank_of(lm, ages)
    lm.rejuvenate(bank, age, rows, 1e-9, data, life=400)
    new = born(bank).nonzero()[:, 0].tolist()
    gone = [ages[i] for i in new]
    expect(set(new) <= set(rows.tolist()),
           f"states of the ages {gone} die; some of them were not visited now, and wait")
    expect(not {380, 399} & set(gone),
           f"with life 400 and hardly any p, states of the ages {gone} die: some have not reached it")
    expect(800 in gone, "with life 400 a visited state of age 800 lives on")
    expect(401 in gone, "a state of age 401 lives on with life 400: age and life are both counted in steps")
    expect(400 in gone, "a state that has just reached its greatest age lives on")
    expect((age == 0).nonzero()[:, 0].tolist() == new and set(age.tolist()) == {0, 380, 420, 20, 399, 600},
           "the ages do not belong to the states any more: 0 for new ones, as before for all others")
    ages = [400, 380] * 1000
    bank, age, data = bank_of(lm, ages)
    lm.rejuvenate(bank, age, torch.arange(2000), 0.3, data, life=400)
    old, young = born(bank)[::2].float().mean().item(), born(bank)[1::2].float().mean().item()
    expect(old == 1, f"of the states that have reached their greatest age only {old:.2f} die where p is .3")
    expect(abs(young - 0.3) < 0.06, f"of the states below the greatest age {young:.2f} die where p is .3")
    expect(torch.equal(born(bank), age == 0), "new states and ages of 0 are not the same rows")


EXERCISES = [
    Exercise("lifecycle_midrun-1", unchanged, lives, {
        "LIFE": "mean life of a state in Langevin steps, for k_train 20 and p .05",
        "OUTLIVE": "share of the states that outlive this mean life",
        "AGE": "mean age of the bank in steps after 800 updates of 64 of the 1024 states each; at first all are 0"}),
    Exercise("lifecycle_midrun-2", without_dice, segmentation),
    Exercise("lifecycle_midrun-3", wrong_rows, death),
    Exercise("lifecycle_midrun-4", unchanged, greatest_age),
]
