"""Solutions of the exercises of lifecycle_midrun.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

LIVES = {"LIFE": 400, "OUTLIVE": 0.358, "AGE": 351}
EXACT = {"LIFE": 20 / 0.05, "OUTLIVE": 0.95 ** 20, "AGE": 380 * (1 - 0.95 ** 50)}

DICE = '''
def dice(prediction, mask):
    hits = {hits}
    FP = ((prediction > 0) & (prediction != mask)).flatten(1).sum(1)
    FN = ((mask > 0) & (prediction != mask)).flatten(1).sum(1)
    return {ratio}
'''
HITS = "((prediction == mask) & (mask > 0)).flatten(1).sum(1)"
RATIO = "2 * hits / (2 * hits + FP + FN + 1e-9)"
OTHER_DICE = '''
def dice(prediction, mask):
    scores = []
    for found, true in zip(prediction, mask):
        hits = ((found == true) * (true != 0)).sum().double()
        ink = (found != 0).sum() + (true != 0).sum()
        scores.append((2 * hits / (ink + 1e-9)).float())
    return torch.stack(scores)
'''
CLASSES = '''
def dice(prediction, mask):
    scores = []
    for found, true in zip(prediction, mask):
        each = []
        for c in true.unique():
            if c > 0:
                hits = ((found == c) & (true == c)).sum()
                each.append(2 * hits / ((found == c).sum() + (true == c).sum() + 1e-9))
        scores.append(torch.stack(each).mean() if each else torch.zeros(()))
    return torch.stack(scores)
'''
RIGHT = '''
def right(self, prediction, y):
    mask, clean = {unpack}
    return {test}
'''
OTHER_RIGHT = '''
def right(self, prediction, y):
    ratio = dice(prediction, y[:, 0]) / dice(y[:, 1], y[:, 0])
    return ratio >= 0.5
'''
TEST = "2 * dice(prediction, mask) >= dice(clean, mask)"


def segmentation(hits=HITS, ratio=RATIO, unpack="y.unbind(1)", test=TEST):
    """Both functions, with one line changed."""
    return {"dice": DICE.format(hits=hits, ratio=ratio), "Segmenter.right": RIGHT.format(unpack=unpack, test=test)}


REJUVENATE = '''
def rejuvenate(bank, age, rows, p, data):
    dies = {coin}
    rows = {rows}
    bank[{places}] = data.take({index})
    age[{aged}] = 0
'''
COIN, RANDOM = "torch.rand(len(rows)) < p", "torch.randint(len(data), (len(rows),))"
LOOP = '''
def rejuvenate(bank, age, rows, p, data):
    for row in rows.tolist():
        if torch.rand(()).item() < p:
            image = data.take(torch.randint(len(data), (1,)))
            bank[row] = image[0].to(bank.device)
            age[row] = 0
'''


def rejuvenate(coin=COIN, rows="rows[dies]", places="rows", index=RANDOM, aged="rows"):
    """The whole function, with one piece changed."""
    return {"rejuvenate": REJUVENATE.format(coin=coin, rows=rows, places=places, index=index, aged=aged)}


def aging(coin, head="life=float('inf')", **changes):
    """rejuvenate with a greatest age."""
    text = rejuvenate(coin, **changes)["rejuvenate"]
    return {"rejuvenate": text.replace("p, data)", f"p, data, {head})", 1)}


LIMIT = '''
def rejuvenate(bank, age, rows, p, data, *, life=None):
    chance = torch.full((len(rows),), float(p))
    if life is not None:
        chance[age[rows].cpu() >= life] = 1.0
    dead = rows[torch.bernoulli(chance).bool()]
    if len(dead):
        bank[dead] = data.take(torch.randint(len(data), (len(dead),))).to(bank.device)
        age[dead] = 0
'''

SOLUTIONS = {
    "lifecycle_midrun-1": Solution(
        right=[{"answers": LIVES}, {"answers": EXACT}, {"answers": {**LIVES, "AGE": 359}}],
        wrong=[wrong("number of visits", answers={**LIVES, "LIFE": 20}), wrong("LIFE", answers={**LIVES, "LIFE": 1000}),
               wrong("median", answers={**LIVES, "OUTLIVE": 0.5}),
               wrong("has died", answers={**LIVES, "OUTLIVE": 0.64}),
               wrong("must a state win", answers={**LIVES, "OUTLIVE": 0.05}),
               wrong("endless", answers={**LIVES, "AGE": 400}), wrong("endless", answers={**LIVES, "AGE": 380}),
               wrong("nobody ever died", answers={**LIVES, "AGE": 500}),
               wrong("lived through", answers={**LIVES, "AGE": 200})]),
    "lifecycle_midrun-2": Solution(
        right=[segmentation(), {"dice": OTHER_DICE, "Segmenter.right": OTHER_RIGHT}],
        wrong=[wrong("intersection over union", **segmentation(ratio="hits / (hits + FP + FN + 1e-9)")),
               wrong("misprint", **segmentation(ratio="2 * hits / (2 * hits + FP * FN + 1e-9)")),
               wrong("wrong class", **segmentation(hits="((prediction > 0) & (mask > 0)).flatten(1).sum(1)")),
               wrong("neither mask has ink", **segmentation(ratio=RATIO.replace(" + 1e-9", ""))),
               wrong("one number an image", **segmentation(
                   hits=HITS.replace(".flatten(1).sum(1)", ".sum()"),
                   ratio="2 * hits / (2 * hits + FP.sum() + FN.sum())")),
               wrong("share of pixels", **segmentation(ratio="(prediction == mask).float().flatten(1).mean(1)")),
               wrong("over all classes together", **{**segmentation(), "dice": CLASSES}),
               wrong("both are in the page", **segmentation(hits="(prediction == mask).flatten(1).sum(1)")),
               wrong("exactly half is right", **segmentation(test=TEST.replace(">=", ">"))),
               wrong("Dice 1/4 after the attack, 1/2 before", **segmentation(test="dice(prediction, mask) >= 0.5")),
               wrong("half", **segmentation(unpack="y[:, 1], y[:, 0]")),
               wrong("half", **segmentation(test="dice(prediction, clean) >= dice(mask, clean) / 2")),
               wrong("one bool an image", **segmentation(test=f"({TEST}).all()"))]),
    "lifecycle_midrun-3": Solution(
        right=[rejuvenate(), {"rejuvenate": LOOP},
               {"swaps": [("        bank[dead] =", "        dead = rows[dead]\n        bank[dead] =")]}],
        wrong=[wrong("k-th state", **rejuvenate(rows="dies.nonzero()[:, 0]")),
               wrong("age is 0 in rows", **rejuvenate(aged="dies.nonzero()[:, 0]")),
               wrong("age is 0 in rows", **rejuvenate(aged="[]")),
               wrong("although p", **rejuvenate(rows="rows")),
               wrong("although p", **rejuvenate(coin="torch.rand(len(rows)) > p")),
               wrong("a coin of its own", **rejuvenate(coin="torch.rand(1).expand(len(rows)) < p")),
               wrong("place in the batch", **rejuvenate(rows="rows[: dies.sum()]")),
               wrong("same training image", **rejuvenate(index="torch.randint(len(data), (1,))")),
               wrong("only some of the training images", **rejuvenate(index=RANDOM + " // 2")),
               wrong("in their order", **rejuvenate(index="torch.arange(len(rows)) % len(data)")),
               wrong("0.09", **rejuvenate(coin="(torch.rand(len(rows)) < p) & (torch.rand(len(rows)) < p)")),
               wrong("not a training image", **{"rejuvenate": rejuvenate()["rejuvenate"].replace(
                   "data.take(torch.randint(len(data), (len(rows),)))", "-torch.rand(len(rows), 1, 1, 1) - 2")}),
               wrong("in place", **{"rejuvenate": rejuvenate()["rejuvenate"].replace(
                   "    bank[", "    bank, age = bank.clone(), age.clone()\n    bank[")})]),
    "lifecycle_midrun-4": Solution(
        right=[aging(f"({COIN}) | (age[rows] >= life)"), {"rejuvenate": LIMIT},
               aging("torch.rand(len(rows)) < torch.where(age[rows] >= life, 1.0, p)")],
        wrong=[wrong("just reached", **aging(f"({COIN}) | (age[rows] > life)")),
               wrong("not reached", **aging(f"({COIN}) | (age[rows] >= life / 2)")),
               wrong("counted in steps", **aging(f"({COIN}) | (age[rows] >= life * 2)")),
               wrong("age 800 lives on", **aging(f"({COIN}) | (age[rows] >= 20 * life)")),
               wrong("nobody dies with p = 1", **aging("age[rows] >= life")),
               wrong("with life 400 and states", **aging(f"({COIN}) if life > 1e9 else (age[rows] >= life)")),
               wrong("only", **aging(f"({COIN}) & (p > 0.1) | (age[rows] >= life) & (p < 0.1)")),
               wrong("not visited", **{"rejuvenate": LIMIT.replace("    if len(dead)", '''    if life is not None:
        old = (age >= life).nonzero()[:, 0]
        dead = torch.cat([dead, old]).unique()
    if len(dead)''')}),
               wrong("no argument named life", **rejuvenate()),
               wrong("no default", **aging(f"({COIN}) | (age[rows] >= life)", head="life")),
               wrong("all must be as it was", **aging(f"({COIN}) | (age[rows] >= life)", head="life=20"))]),
}
