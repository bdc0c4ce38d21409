"""Solutions of the exercises of ood_detect.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

RIGHT = {"CONSTANT": 0.5, "TIES": 0.75, "WORST": 0.25, "FPR": 0.5}
AUROC = '''
def auroc(positive, negative):
    """Pairs."""
    return {text}
'''
RANKS = '''
def auroc(positive, negative):
    """By ranks, those of equal scores averaged (Mann and Whitney)."""
    scores = torch.cat([positive, negative]).double()
    values, place, count = scores.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0)
    rank = last - (count - 1) / 2
    n, m = len(positive), len(negative)
    u = rank[place][:n].sum() - n * (n + 1) / 2
    return (u / (n * m)).item()
'''
UNTIED_RANKS = '''
def auroc(positive, negative):
    rank = torch.cat([positive, negative]).argsort(stable=True).argsort() + 1
    n, m = len(positive), len(negative)
    return (rank[:n].sum() - n * (n + 1) / 2).item() / (n * m)
'''
IN_PLACE = '''
def auroc(positive, negative):
    negative[:] = negative.sort().values
    below = torch.searchsorted(negative, positive)
    up_to = torch.searchsorted(negative, positive, right=True)
    return (below + up_to).sum().item() / 2 / len(positive) / len(negative)
'''
PAIRS = "((positive[:, None] > negative).float().mean() + (positive[:, None] >= negative).float().mean()).item() / 2"
SWAPPED = "((negative[:, None] - positive).sign().mean().item() + 1) / 2"
SCORE_LOSS = '''
def score_loss(x, net, score, sign):
    """What attacks in tests minimise: minus the score (sign 1), or the score (sign -1) [n]."""
    {body}
'''
ENTROPY = '''
def free_energy(z):
    """Minus the free energy of a classifier: outputs [n, K] -> [n]."""
    return z.logsumexp(1)

def minus_entropy(z):
    """Minus the entropy of a classifier's probabilities: outputs [n, K] -> [n]."""
    return {text}
'''
ROW = '    "Outlier Exposure": ("exposure", confidence),\n'
P_LOG_P = "(z.softmax(1) * z.log_softmax(1)).sum(1)"
STEP = "project(x - a.step * m, x0, a), m"
BEST = "(score > best)[:, None, None, None]"
DEFAULT = "def worst_case(detector, x0, a, restarts, sign=1)"
ABOUT = "about = (detector.net, detector.score, sign)"


def said(**change):
    """The right answers, but for these."""
    return {"answers": {**RIGHT, **change}}


def auroc(text):
    """auroc() as one expression."""
    return {"auroc": AUROC.format(text=text)}


def score_loss(body):
    """score_loss() with this body."""
    return {"score_loss": SCORE_LOSS.format(body=body)}


def swapped(*pairs):
    """Places changed elsewhere in the script."""
    return {"swaps": list(pairs)}


def entropy(text, row='    "softmax, entropy": ("softmax", minus_entropy),\n' + ROW):
    """minus_entropy() as one expression, and rows of DETECTORS."""
    return {"free_energy": ENTROPY.format(text=text), "swaps": [(ROW, row)]}


SOLUTIONS = {
    "ood_detect-1": Solution(
        right=[said(), said(TIES=6 / 8, WORST=2 / 8, FPR="0.5")],
        wrong=[wrong("every pair", **said(CONSTANT=0.0)), wrong("every pair", **said(CONSTANT=1)),
               wrong("as lost or as won", **said(TIES=0.625)), wrong("as lost or as won", **said(TIES=0.875)),
               wrong("4 x 2 pairs", **said(TIES=0.25)), wrong("turned round", **said(WORST=0.5)),
               wrong("turned round", **said(WORST=0.75)), wrong("turned round", **said(WORST=0.125)),
               wrong("leaves out", **said(FPR=0.25)), wrong("wrong end", **said(FPR=0)),
               wrong("19th", **said(FPR=0.75)), wrong("write a number", **said(FPR="half")),
               wrong("no answer", **said(WORST=None))]),
    "ood_detect-2": Solution(
        right=[auroc(PAIRS), {"auroc": RANKS},
               auroc("((positive[:, None] - negative).sign().double().mean().item() + 1) / 2")],
        wrong=[wrong("one half", **auroc("(positive[:, None] > negative).float().mean().item()")),
               wrong("one half", **auroc("(positive[:, None] >= negative).float().mean().item()")),
               wrong("changed places", **auroc(SWAPPED)),
               wrong("worse than chance", **auroc(f"max({PAIRS}, 1 - {PAIRS})")),
               wrong("plain number", **auroc("((positive[:, None] - negative).sign().mean() + 1) / 2")),
               wrong("product of", auroc=RANKS.replace("(n * m)", "(n * n)")),
               wrong("one half", auroc=UNTIED_RANKS), wrong("changes the scores", auroc=IN_PLACE),
               wrong("nothing is filled in"),
               wrong("one by one", **auroc(PAIRS.replace("positive[", "positive[-4:][")))]),
    "ood_detect-3": Solution(
        right=[score_loss("return -sign * score(net(x))"),
               score_loss("reached = score(net(x))\n    return -reached if sign > 0 else reached"),
               swapped((ABOUT, "about = (detector.net, detector.score, -sign)"))],
        wrong=[wrong("scores of other images", **swapped((BEST, BEST.replace(">", "<")))),
               wrong("LOW", **score_loss("return -score(net(x))")),
               wrong("in training", **swapped((STEP, STEP.replace("x - a", "x + a")))),
               wrong("own score", **score_loss("return -sign * net(x)[:, 0]")),
               wrong("no higher", **score_loss("return 0 * score(net(x))")),
               wrong("Auto-PGD still", **swapped(
                   ("momentum_pgd(score_loss, x0, a._replace(step=2 * a.eps / a.steps, momentum=0.75), *about)",
                    "momentum_pgd(score_loss, x0, a._replace(step=-2 * a.eps / a.steps, momentum=0.75), *about)"))),
               wrong("no higher", **swapped((DEFAULT, DEFAULT.replace("=1", "=-1"))))]),
    "ood_detect-4": Solution(
        right=[entropy(P_LOG_P), entropy("-torch.distributions.Categorical(logits=z).entropy()"),
               entropy("(z.softmax(1) * z).sum(1) - z.logsumexp(1)",
                       ROW + '    "exposure, entropy": ("exposure", minus_entropy),\n'
                       '    "entropy": ("softmax", minus_entropy),\n')],
        wrong=[wrong("there is no function", **swapped((ROW, ROW + ROW))),
               wrong("HIGH", **entropy("-" + P_LOG_P)), wrong("natural", **entropy(P_LOG_P + " / math.log(2)")),
               wrong("sum over", **entropy(P_LOG_P.replace("sum", "mean"))),
               wrong("one score for each", **entropy(P_LOG_P.replace("sum(1)", "sum()"))),
               wrong("sum over", **entropy("(z.sigmoid() * F.logsigmoid(z)).sum(1)")),
               wrong("must not meet", **entropy("(z.softmax(1) * z.softmax(1).log()).sum(1)")),
               wrong("not finite", **entropy("(z.softmax(1) * z.softmax(1).log()).nan_to_num().sum(1)")),
               wrong("no row", **entropy(P_LOG_P, ROW)),
               wrong("one output", **entropy(P_LOG_P, ROW + '    "e": ("binary", minus_entropy),\n')),
               wrong("beside the other two", **entropy(P_LOG_P, ROW + '    "e": ("ratio", minus_entropy),\n')),
               wrong("lost its row", **entropy(P_LOG_P, '    "e": ("softmax", minus_entropy),\n'))]),
}
