"""Solutions of the exercises of gen_classify.py, right ones and typical wrong ones."""
import math

from solutions import Solution, wrong

BAYES = {"CLASS": 0, "PROBABILITY": 0.576, "SHIFTED": -7}
CLAIM = {"SOURCE_G": 0.75, "SOURCE_S": 0.25, "WORST_G": 0.25, "LEAD": "attack"}
BACKWARD = "loss.mean().backward()"
OPTIMIZER = "optimizer = torch.optim.SGD(d.parameters(), s.lr, momentum=0.9, weight_decay=s.weight_decay)"
TOGETHER = '''
def likest_images(net, x, y, a):
    """All classes at once."""
    x0 = x.expand(net.d.K, *x.shape)
    made = repeat(training_step, x0, a.steps, net.d, x0, a, {sign})
    n = torch.arange(len(x))
    reached = {reached}
    {mask}
    return made[reached.argmax(0), n]
'''
ONE_BY_ONE = '''
def likest_images(net, x, y, a):
    """One class after another."""
    best = torch.full_like(x[:, 0, 0, 0], {start})
    best_x = x
    for i in range({first}, net.d.K):
        k = (y + i) % net.d.K
        made, _ = attack(net, x, y, k, {loss}, a)
        with torch.no_grad():
            reached = own_logit(net({judged}), k)
        better = reached > best
        best_x = torch.where(better[:, None, None, None], made, best_x)
        best = torch.where(better, reached, best)
    return best_x
'''
BY_HAND = '''
def likest_images(net, x, y, a):
    """Image by image, each d_k by itself."""
    chosen = []
    for image, label in zip(x, y.tolist()):
        found = []
        for k, one in enumerate(net.d.nets):
            if k == label:
                continue
            start = image[None]
            z = start
            for _ in range(a.steps):
                z = z.detach().requires_grad_(True)
                gradient = torch.autograd.grad(one(z).sum(), z)[0]
                z = down(z.detach(), -gradient, start, a)
            found.append(((one(z)[0, 0] + net.c[k]).item(), k, z))
        chosen.append(max(found)[2])
    return torch.cat(chosen)
'''
LEAKING = BY_HAND.replace("torch.autograd.grad(one(z).sum(), z)[0]", "one(z).sum().backward() or z.grad")
MARGIN = "net.d(made) + net.c[:, None] - own_logit(net(made.flatten(0, 1)), y.repeat(net.d.K)).view(net.d.K, -1)"


def bayes(**change):
    """The right answers of gen_classify-1, but for these."""
    return {"answers": {**BAYES, **change}}


def claim(**change):
    """The right answers of gen_classify-2, but for these."""
    return {"answers": {**CLAIM, **change}}


def swapped(*pairs):
    """Places changed in the script."""
    return {"swaps": list(pairs)}


def together(sign="-1", reached="net.d(made) + net.c[:, None]", mask="reached[y, n] = -math.inf"):
    """likest_images() of all classes at once."""
    return {"likest_images": TOGETHER.format(sign=sign, reached=reached, mask=mask)}


def one_by_one(start="-math.inf", first="1", loss="class_attack", judged="made"):
    """likest_images() of one class after another."""
    return {"likest_images": ONE_BY_ONE.format(start=start, first=first, loss=loss, judged=judged)}


ALL = together()["likest_images"]
SOLUTIONS = {
    "gen_classify-1": Solution(
        right=[bayes(), bayes(CLASS="0", PROBABILITY=math.e / (math.e + 2), SHIFTED=-7.0)],
        wrong=[wrong("largest d,", **bayes(CLASS=1)), wrong("largest c;", **bayes(CLASS=2)),
               wrong("count from 0", **bayes(CLASS=3)), wrong("divides by a sum", **bayes(PROBABILITY=0.818)),
               wrong("softmax", **bayes(PROBABILITY=0.254)), wrong("softmax", **bayes(PROBABILITY=1.5)),
               wrong("wrong sign", **bayes(SHIFTED=3)), wrong("afterwards", **bayes(SHIFTED=-5)),
               wrong("c takes up", **bayes(SHIFTED=-2)), wrong("write a number", **bayes(CLASS="first")),
               wrong("no answer", **bayes(SHIFTED=None))]),
    "gen_classify-2": Solution(
        right=[claim(), claim(SOURCE_G=3 / 4, SOURCE_S="0.25", LEAD=" Attack")],
        wrong=[wrong("raises d of the other", **claim(SOURCE_G=0.25)), wrong("gaps", **claim(SOURCE_G=1)),
               wrong("moves both", **claim(SOURCE_S=0.75)), wrong("sqrt 2", **claim(SOURCE_S=0)),
               wrong("breaks the other", **claim(WORST_G=0.75)), wrong("same outputs", **claim(LEAD="model")),
               wrong("c is 0", **claim(LEAD="calibration")), wrong("none of", **claim(LEAD="robustness"))]),
    "gen_classify-3": Solution(
        right=[swapped((BACKWARD, "loss.sum().backward()")),
               swapped((BACKWARD, "loss.backward(torch.ones_like(loss))")),
               swapped((BACKWARD, "[own_loss.backward(retain_graph=True) for own_loss in loss]")),
               swapped((BACKWARD, "(len(nets) * loss).mean().backward()"))],
        wrong=[wrong("not trained at all", **swapped((BACKWARD, "loss[0].backward()"))),
               wrong("weight decay is", **swapped((OPTIMIZER, OPTIMIZER.replace("s.lr", "s.lr * len(nets)")))),
               wrong("moves along 5.00", **swapped((BACKWARD, "(10 * loss.mean()).backward()"))),
               wrong("the log has the loss", **swapped((BACKWARD, "loss = loss.sum(); loss.backward()"))),
               wrong("moves along 2.00", **swapped((BACKWARD, "(inside + outside).sum().backward()"))),
               wrong("moves along 2.00", **swapped((BACKWARD, "(len(nets) * loss.sum()).backward()"))),
               wrong("not trained at all", **swapped((BACKWARD, "loss.amax().backward()")))]),
    "gen_classify-4": Solution(
        right=[together(), one_by_one(), {"likest_images": BY_HAND}],
        wrong=[wrong("nothing is filled in"),
               wrong("own label", **together(mask="pass")), wrong("own label", **one_by_one(first="0")),
               wrong("lowered too", **one_by_one(loss="class_margin_attack")),
               wrong("lowered too", **one_by_one(loss="entropy_attack")),
               wrong("c decides", **together(reached="net.d(made)")),
               wrong("one for each", **together(reached="net.d(made) + net.c")),
               wrong("c decides", likest_images=BY_HAND.replace(" + net.c[k]", "")),
               wrong("before the attack", **one_by_one(judged="x")),
               wrong("before the attack", **together(reached="net(x).T.clone()")),
               wrong("furthest above", **together(reached=MARGIN)),
               wrong("three of different", **together(mask="reached[y] = -math.inf")),
               wrong("by -inf", **together(mask="reached[y, n] = 0")), wrong("by -inf", **one_by_one(start="0.0")),
               wrong("reaches less", **together(reached="-(net.d(made) + net.c[:, None])")),
               wrong("leaves a gradient", likest_images=LEAKING),
               wrong("less like every class", **together(sign="1")),
               wrong("four are not", likest_images=BY_HAND.replace("(net.d.nets)", "(net.d.nets[:3])")),
               wrong("one for each", likest_images=ALL.replace(", n]\n", "]\n")),
               wrong("more than one step", likest_images=ALL.replace("a.steps", "1"))]),
}
