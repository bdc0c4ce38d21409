"""Solutions of the exercises of stochastic_security.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

KEPT = {"WIDE": 0.91, "MIDDLE": 0.43, "NARROW": 0.0, "STEPS": 204}
EXACT = {"WIDE": (1 - 0.00125) ** 75, "MIDDLE": (1 - 0.01125) ** 75, "NARROW": 0.875 ** 75, "STEPS": 203.5}

BUG_STILL = "still = record[0].clone()"
BUG_VERDICT = "            still[broken] = False\n"
BEFORE = '''            if len(broken):
                verdict = {verdict}
                broken = broken[{stay}]
            still[broken] = False
'''
JUDGED = "defence.predict(x[broken], attack.H_def)"


def attack(still="still = record[t - 1].clone()", verdict=JUDGED, stay="~defence.right(verdict, y[broken])"):
    """Both bugs mended, or a part of them."""
    swaps = [(BUG_STILL, still)]
    if verdict:
        swaps.append((BUG_VERDICT, BEFORE.format(verdict=verdict, stay=stay)))
    return {"swaps": swaps}


OTHER_ATTACK = {"swaps": [
    (BUG_STILL, "still = record[:t].all(0)"),
    ("            broken = alive[~defence.right(logits.argmax(1), y[alive])]\n" + BUG_VERDICT, '''
            wrong = logits.argmax(1) != y[alive]
            for i in alive[wrong].tolist():
                F_H = defence.logits(x[i : i + 1], attack.H_def).mean(0)
                still[i] = bool(F_H.argmax(1) == y[i])
''')]}
JUDGES_ALL = {"swaps": [
    (BUG_STILL, "still = record[t - 1].clone()"),
    ("            broken = alive[~defence.right(logits.argmax(1), y[alive])]\n",
     "            broken = alive[~defence.right(defence.predict(x[alive], attack.H_def), y[alive])]\n")]}
ATTACKS_ON = attack()
ATTACKS_ON["swaps"] = [(BUG_STILL, BUG_STILL), ATTACKS_ON["swaps"][1],
                       ("        record[t] = still\n", "        record[t] = still & record[t - 1]\n")]
STEPS_FIRST = {"swaps": [
    (BUG_STILL, "still = record[t - 1].clone()"),
    (BUG_VERDICT, "            x[broken] = attack.ball.ascend(x[broken], x0[broken], gradient[: len(broken)])\n"
     + BEFORE.format(verdict=JUDGED, stay="~defence.right(verdict, y[broken])"))]}

GRADIENT = '''
def gradient(self, x, y, H, whole=False):
    H = H if self.K else 1
    copies = x.repeat(H, 1, 1, 1)
    if whole:
        ends, way = self.path(copies, self.K)
    else:
        ends = self.purify(x, H, self.K)
    ends.requires_grad_(True)
    with torch.enable_grad():
        each = self.f(ends).float().unflatten(0, (H, len(x)))
        F_H = each.mean(0)
        loss = {loss}
    (gradient,) = torch.autograd.grad(loss, ends)
    {back}
    return {result}
'''
BACK = "gradient = self.back(gradient, way) if whole else gradient"
RESULT = "F_H.detach(), gradient.unflatten(0, (H, len(x))).sum(0)"
OTHER_GRADIENT = '''
def gradient(self, x, y, H, whole=False):
    if self.K == 0:
        H = 1
    results = []
    for image, label in zip(x.split(1), y.split(1)):
        ends, ways = [], []
        for _ in range(H):
            if whole:
                end, way = self.path(image, self.K)
                ways.append(way)
            else:
                end = self.chain(image, self.K)
            ends.append(end.detach().clone().requires_grad_(True))
        with torch.enable_grad():
            F_H = sum(self.f(end) for end in ends) / H
            loss = self.loss(F_H, label)
        slopes = torch.autograd.grad(loss, ends)
        if whole:
            slopes = [self.back(slope, way) for slope, way in zip(slopes, ways)]
        results.append((F_H.detach(), sum(slopes)))
    logits, gradients = zip(*results)
    return torch.cat(logits), torch.cat(gradients)
'''
AT_IMAGES = '''
def gradient(self, x, y, H, whole=False):
    F_H = self.logits(x, H).mean(0)
    return F_H, input_gradient(lambda x: F.cross_entropy(self.f(x), y, reduction="none"), x)
'''


def gradient(loss="self.loss(F_H, y)", back=BACK, result=RESULT):
    """The body with one line changed."""
    return {"Defence.gradient": GRADIENT.format(loss=loss, back=back, result=result)}


def mixed():
    """Copies in one order, their sum in another."""
    other = "each.flatten(0, 1).unflatten(0, (len(x), H)).mean(1)"
    return {"Defence.gradient": gradient()["Defence.gradient"].replace("each.mean(0)", other)}


JUDGED_RIGHT = {"PIXELS_LINF": "same", "PIXELS_L2": "weaker", "TURNED_LINF": "backwards", "SHARE_L2": 0.71,
                "MORE_CHAINS": "no"}


def judged(**changes):
    """All answers right but these."""
    return {"answers": {**JUDGED_RIGHT, **changes}}


SOLUTIONS = {
    "stochastic_security-1": Solution(
        right=[{"answers": KEPT}, {"answers": EXACT}],
        wrong=[wrong("share forgotten", answers={**KEPT, "WIDE": 0.09}),
               wrong("half of tau^2", answers={**KEPT, "WIDE": 0.829}),
               wrong("too much", answers={**KEPT, "MIDDLE": 0.9887}),
               wrong("too little", answers={**KEPT, "MIDDLE": 0.15}),
               wrong("NARROW", answers={**KEPT, "NARROW": 0.1}),
               wrong("straight line", answers={**KEPT, "STEPS": 80}),
               wrong("straight line", answers={**KEPT, "STEPS": 102}),
               wrong("STEPS has no answer", answers={**KEPT, "STEPS": None})]),
    "stochastic_security-2": Solution(
        right=[attack(), OTHER_ATTACK, attack(verdict="defence.logits(x[broken], attack.H_def).mean(0).argmax(1)")],
        wrong=[wrong("misread by chance", **attack(verdict=None)),
               wrong("right again later", **attack(still=BUG_STILL)),
               wrong("H_def = 9", **attack(verdict="defence.predict(x[broken], attack.H_adv)")),
               wrong("another image", **attack(verdict="defence.predict(x0[broken], attack.H_def)")),
               wrong("another image", **STEPS_FIRST),
               wrong("misread by chance", **attack(stay="defence.right(verdict, y[broken])")),
               wrong("looks broken", **JUDGES_ALL),
               wrong("mean of fresh chains", **attack(verdict="defence.logits(x[broken], attack.H_def)[0].argmax(1)")),
               wrong("mean of fresh chains", **attack(
                   verdict="defence.logits(x[broken], attack.H_def).argmax(2).mode(0).values")),
               wrong("goes on being attacked", **ATTACKS_ON)]),
    "stochastic_security-3": Solution(
        right=[gradient(), {"Defence.gradient": OTHER_GRADIENT}],
        wrong=[wrong("mean of the chains' losses",
                     **gradient('F.cross_entropy(each.flatten(0, 1), y.repeat(H), reduction="sum") / H')),
               wrong("mean of the chains' losses",
                     **gradient('F.cross_entropy(each.flatten(0, 1), y.repeat(H), reduction="sum")')),
               wrong("self.loss", **gradient(loss='F.cross_entropy(F_H, y, reduction="sum")')),
               wrong("two things", **gradient(result="gradient.unflatten(0, (H, len(x))).sum(0)")),
               wrong("0.25 times", **gradient("F.cross_entropy(F_H, y)")),
               wrong("0.33 times", **gradient(result=RESULT.replace("sum(0)", "mean(0)"))),
               wrong("DOWN", **gradient("-self.loss(F_H, y)")),
               wrong("stops at the chains' ends", **gradient(back="pass")),
               wrong("before the sum over chains", **gradient(
                   back="gradient = gradient.unflatten(0, (H, len(x))).sum(0)\n    " + BACK,
                   result="F_H.detach(), gradient")),
               wrong("graph", **gradient(result=RESULT.replace("F_H.detach()", "F_H"))),
               wrong("not the mean of the logits", **mixed()),
               wrong("not the mean of the logits", **gradient(result=RESULT.replace("F_H", "each[0]"))),
               wrong("gradient is (12, 1, 2, 2)", **gradient(result="F_H.detach(), gradient")),
               wrong("at the image", **{"Defence.gradient": AT_IMAGES}),
               wrong("parameters", **{"Defence.gradient": gradient()["Defence.gradient"].replace(
                   "(gradient,) = torch.autograd.grad(loss, ends)", "loss.backward(); gradient = ends.grad")})]),
    "stochastic_security-4": Solution(
        right=[judged(), judged(SHARE_L2=0.5 ** 0.5, PIXELS_LINF=" Same", MORE_CHAINS="No")],
        wrong=[wrong("sign", **judged(TURNED_LINF="weaker")),
               wrong("what does an l_inf step", **judged(PIXELS_LINF="weaker")),
               wrong("one length", **judged(PIXELS_L2="same")), wrong("SHARE_L2", **judged(SHARE_L2=0.5)),
               wrong("none of same", **judged(PIXELS_L2="less")),
               wrong("noise of a gradient", **judged(MORE_CHAINS="yes")),
               wrong("neither", **judged(MORE_CHAINS="maybe"))]),
}
