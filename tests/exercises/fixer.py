"""Solutions of the exercises of fixer.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

PERCEPTUAL = '''
def perceptual_loss(x, target, layers, mean, std):
    """Eq. 5.4."""
    seen = layers((x - mean) / std)
    wanted = layers((target - mean) / std)
    return {loss}
'''
WHOLE = '''
def perceptual_loss(x, target, layers, mean, std):
    return {loss}
'''
BUG = "key=lambda pair: pair[0])"
MENDED = (BUG, "key=lambda pair: pair[1])")
BEFORE = {"PIXEL": 1.7, "MOVING": 2, "ACCURACY": 0.95, "CLOSED": 0.833}
JUDGED = {"AVERAGE_AROUND": 0.01, "AVERAGE_THROUGH": -0.01, "ROUND_AROUND": -0.07, "ROUND_THROUGH": 0.93,
          "NEEDED": "both", "JOINED": 0.5}


def perceptual(loss="(seen - wanted).square().mean()"):
    return {"perceptual_loss": PERCEPTUAL.format(loss=loss)}


def whole(loss):
    return {"perceptual_loss": WHOLE.format(loss=loss)}


def before(**changes):
    return {"answers": {**BEFORE, **changes}}


def judged(**changes):
    return {"answers": {**JUDGED, **changes}}


def swaps(*pairs):
    return {"swaps": list(pairs)}


SOLUTIONS = {
    "fixer-1": Solution(
        right=[before(), before(PIXEL=17 / 10, ACCURACY=(300 + 84 - 4) / 400, CLOSED=80 / 96)],
        wrong=[wrong("PIXEL", **before(PIXEL=1.0)), wrong("through the weights of the last", **before(MOVING=1)),
               wrong("MOVING", **before(MOVING=48)), wrong("spoils", **before(ACCURACY=0.96)),
               wrong("spoils", **before(ACCURACY=0.97)), wrong("repaired minus spoiled", **before(CLOSED=84 / 96)),
               wrong("the gap is", **before(CLOSED=0.8)), wrong("write a number", **before(PIXEL="x")),
               wrong("no answer", answers={"PIXEL": 1.7})]),
    "fixer-2": Solution(
        right=[perceptual(), perceptual("sum((a - b).pow(2).mean() for a, b in zip(seen, wanted)) / len(x)"),
               whole("F.mse_loss(*layers((torch.cat([x, target]) - mean) / std).float().chunk(2))")],
        wrong=[wrong("120 times", **perceptual("(seen - wanted).square().sum()")),
               wrong("24 times", **perceptual("(seen - wanted).square().sum((1, 2, 3)).mean()")),
               wrong("2 times", **perceptual("(seen - wanted).square().sum(1).mean()")),
               wrong("a root", **perceptual("(seen - wanted).square().mean().sqrt()")),
               wrong("|a - b|", **perceptual("(seen - wanted).abs().mean()")),
               wrong("no other factor", **perceptual("(seen.mean((2, 3)) - wanted.mean((2, 3))).square().mean()")),
               wrong("one number", **perceptual("(seen - wanted).square().mean((1, 2, 3))")),
               wrong("no gradient", **perceptual("(seen.detach() - wanted).square().mean()")),
               wrong("detached", **perceptual("((seen.detach() - wanted) * (seen - wanted)).mean()")),
               wrong("pixels", **whole("F.mse_loss(x, target)")),
               wrong("see target", **whole("F.mse_loss(layers((x - mean) / std), "
                                         "layers(target.expand(-1, 3, -1, -1)))")),
               wrong("see x", **whole("F.mse_loss(layers(x / std - mean), layers(target / std - mean))")),
               wrong("nothing is clamped", **whole("F.mse_loss(*layers((torch.cat([x, target]).clamp(0, 1) - mean)"
                                                   " / std).chunk(2))")),
               wrong("wants RGB", **whole("F.mse_loss(layers(x), layers(target))")),
               wrong("float", **whole("F.mse_loss(*layers((torch.cat([x, target]) - mean.view(1, -1, 1, 1)) / std)"
                                      ".chunk(2))"))]),
    "fixer-3": Solution(
        right=[swaps(MENDED), swaps((BUG, "key=lambda pair: (pair[-1], 0))")),
               swaps(("lowest = min(losses, " + BUG, "lowest = sorted(losses, key=lambda pair: pair[1])[0]"))],
        wrong=[wrong("ends after epoch 4, not 6", **swaps((BUG, "key=sum)"))),
               wrong("ends after epoch 4, not 3", **swaps(("lowest = min(losses, " + BUG,
                                                          "lowest = max(losses, key=lambda pair: pair[1])"))),
               wrong("figure 5.2", **swaps(("losses.append([train, val])", "losses.append([val, train])"))),
               wrong("held-out", **swaps(MENDED, ("val = mean_loss(run, s, loss, G, z_held, held)",
                                                  "val = mean_loss(run, s, loss, G, z, learned)"))),
               wrong("kept are those after epoch 4", **swaps(MENDED, ("losses[-1] == lowest or not early", "True"))),
               wrong("ends after epoch 4, not 6", **swaps(MENDED, ("if early and epoch - 1",
                                                                  "if not early and epoch - 1"))),
               wrong("ends after epoch 4, not 3", **swaps(MENDED, ("if early and epoch - 1 -",
                                                                  "if early and epoch -"))),
               wrong("early=False", **swaps(MENDED, ("if early and epoch", "if epoch"))),
               wrong("early=False", **swaps(MENDED, ("== lowest or not early", "== lowest")))]),
    "fixer-4": Solution(
        right=[judged(), judged(NEEDED=" Both", JOINED=5 / 10, AVERAGE_AROUND=0.0101)],
        wrong=[wrong("AVERAGE_AROUND", **judged(AVERAGE_AROUND=-0.17)),
               wrong("slope of the mean", **judged(AVERAGE_THROUGH=0.01)),
               wrong("G is asked again", **judged(ROUND_AROUND=0.93)),
               wrong("derivative of round", **judged(ROUND_THROUGH=-0.07)),
               wrong("by 'through' alone", **judged(NEEDED="through")), wrong("one of around", **judged(NEEDED="none")),
               wrong("for each image", **judged(JOINED=0.7)), wrong("count each image once", **judged(JOINED=0.2))]),
}
