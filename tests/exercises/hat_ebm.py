"""Solutions of the exercises of hat_ebm.py, right ones and typical wrong ones."""
from solutions import Solution, wrong

STEP = '''
def hat_step(state, H, G, m):
    """Eq. 6.7, then 6.6."""
    z, g, y = state
    if m.tau_z:
        slope = {slope_z}
        z = z {sign} m.tau_z ** 2 / {two} * slope + {noise_z} * {draw_z}
        g = {again}
    if m.tau_y:
        slope = {slope_y}
        down = m.tau_y ** 2 / 2 * slope
        {clip}
        y = y - down + {noise_y} * torch.randn_like(y)
    return z, g, y
'''
USUAL = {
    "slope_z": "input_gradient(lambda z: H(G(z) + y), z) / m.t", "sign": "-", "two": "2", "noise_z": "m.tau_z",
    "draw_z": "torch.randn_like(z)", "again": "G(z)", "slope_y": "input_gradient(H, g + y) / m.t + 2 * m.prior * y",
    "clip": "down = down * (CLIP / lengths(down).clamp(min=CLIP)).view(-1, 1, 1, 1)", "noise_y": "m.tau_y",
}
ANOTHER = '''
def hat_step(state, H, G, m):
    z, g, y = (part.detach().clone() for part in state)
    with torch.enable_grad():
        if m.tau_z > 0:
            z.requires_grad_(True)
            U = H(G(z) + y).sum() / m.t + m.prior * y.square().sum()
            slope, = torch.autograd.grad(U, z)
            z = torch.normal(z.detach() - m.tau_z ** 2 / 2 * slope, m.tau_z)
            g = G(z).detach()
        if m.tau_y > 0:
            y.requires_grad_(True)
            U = H(g + y).sum() / m.t + m.prior * y.square().sum()
            slope, = torch.autograd.grad(U, y)
            down = m.tau_y ** 2 / 2 * slope
            factor = (CLIP / down.flatten(1).norm(dim=1).clamp(min=1e-12)).clamp(max=1)
            y = y.detach() - factor[:, None, None, None] * down
            y = y + m.tau_y * torch.randn(y.shape, device=y.device)
    return z, g, y
'''
Y_FIRST = '''
def hat_step(state, H, G, m):
    z, g, y = state
    old = y
    if m.tau_y:
        down = m.tau_y ** 2 / 2 * (input_gradient(H, g + y) / m.t + 2 * m.prior * y)
        down = down * (CLIP / lengths(down).clamp(min=CLIP)).view(-1, 1, 1, 1)
        y = y - down + m.tau_y * torch.randn_like(y)
    if m.tau_z:
        slope = input_gradient(lambda z: H(G(z) + old), z) / m.t
        z = z - m.tau_z ** 2 / 2 * slope + m.tau_z * torch.randn_like(z)
        g = G(z)
    return z, g, y
'''
IN_PLACE = STEP.replace("y = y - down + {noise_y} * torch.randn_like(y)", "y += m.tau_y * torch.randn_like(y) - down")
IN_PLACE = IN_PLACE.replace("z = z {sign} m.tau_z ** 2 / {two} * slope + {noise_z} * {draw_z}",
                            "z += m.tau_z * {draw_z} - m.tau_z ** 2 / 2 * slope")
BACKWARD = '''
def hat_step(state, H, G, m):
    z, g, y = state
    with torch.enable_grad():
        if m.tau_z:
            z = z.clone().requires_grad_(True)
            H(G(z) + y).sum().backward()
            z = z.detach() - m.tau_z ** 2 / 2 * z.grad / m.t + m.tau_z * torch.randn_like(y.flatten(1))
            g = G(z).detach()
        if m.tau_y:
            y = y.clone().requires_grad_(True)
            H(g + y).sum().backward()
            down = m.tau_y ** 2 / 2 * (y.grad / m.t + 2 * m.prior * y.detach())
            down = down * (CLIP / lengths(down).clamp(min=CLIP)).view(-1, 1, 1, 1)
            y = y.detach() - down + m.tau_y * torch.randn_like(y)
    return z.detach(), g, y
'''
EXCHANGE = '''
def exchange(bank_z, bank_x, rows, z, x):
    """Put new pairs into these rows of the bank -> the old pairs."""
    {body}
'''
BUG = "bank_x[rows.sort().values] = z, x"
ROWS = "rows = torch.randperm(len(bank_z))[: s.batch]"
MIXED = '''elif pairs == "mixed":
                half = s.batch // 2
                {body}
            elif pairs == "inferred":'''


def step(**changes):
    return {"hat_step": STEP.format(**{**USUAL, **changes})}


def exchange(*lines):
    return {"exchange": EXCHANGE.format(body="\n    ".join(lines))}


def mixed(*lines):
    return {"swaps": [('elif pairs == "inferred":', MIXED.format(body="\n                ".join(lines)))]}


ALWAYS_G = {"hat_step": STEP.format(**USUAL).replace("        g = G(z)\n", "    g = G(z)\n")}
Y_IN_PLACE = {"hat_step": STEP.format(**USUAL).replace("y = y - down +", "y += -down +")}
NO_GUARD = step(clip="size = lengths(down).view(-1, 1, 1, 1); down = down / size * size.clamp(max=CLIP)")


def spread(**changes):
    return {"answers": {"FREE": 2.236, "PEER": 1.0, "RESIDUAL": 0.05, "STEEP": 5.0, **changes}}


OLD = "old = bank_z[rows], bank_x[rows]"
JOIN = "z, chains = torch.cat([z[:half], old_z]), torch.cat([chains[:half], old_x])"
HALF = "rows = torch.randperm(len(bank_z))[:half]"
SWAP = "old_z, old_x = exchange(bank_z, bank_x, rows, z[half:], chains[half:])"

SOLUTIONS = {
    "hat_ebm-1": Solution(
        right=[spread(), spread(FREE=(1 + 400 * 0.01) ** 0.5, PEER=1, RESIDUAL=1 / 400 ** 0.5, STEEP=4 * 1.25)],
        wrong=[wrong("FREE", **spread(FREE=1.0)),
               wrong("variances", **spread(FREE=5.0)), wrong("variances", **spread(FREE=2.0)),
               wrong("which density", **spread(PEER=2.236)),
               wrong("of which variance", **spread(RESIDUAL=1 / 200 ** 0.5)),
               wrong("T divides H", **spread(RESIDUAL=5e-4)), wrong("CLIP", **spread(STEEP=1.25)),
               wrong("write a number", **spread(STEEP="CLIP"))]),
    "hat_ebm-2": Solution(
        right=[step(), {"hat_step": ANOTHER}, ALWAYS_G, step(slope_z="m.t ** -1 * input_gradient(lambda z: H(y + G(z)), z)")],
        wrong=[wrong("changes the tensors", **Y_IN_PLACE), wrong("nan", **NO_GUARD),
               wrong("three things", **{"hat_step": STEP.format(**USUAL).replace("return z, g, y", "return z, y")}),
               wrong("drift of z goes up", **step(sign="+")), wrong("drift of z is not", **step(two="1")),
               wrong("with y on top", **step(slope_z="input_gradient(lambda z: H(G(z)), z) / m.t")),
               wrong("along it 0.50", **step(slope_z="input_gradient(lambda z: H(G(z) + y), z)")),
               wrong("drift of z", **step(slope_z="input_gradient(lambda z: H(G(z) + y), z) / m.t + z")),
               wrong("noise of z has", **step(noise_z="m.tau_z ** 2")),
               wrong("noise of y has", **step(noise_y="m.tau_y ** 2")),
               wrong("noise of y has", **step(noise_y="m.tau_z + 2 * m.tau_y")),
               wrong("nothing random", **step(noise_z="0")),
               wrong("same at several", **step(draw_z="torch.randn(len(z), 1)")),
               wrong("every chain gets the same", **step(draw_z="torch.randn(z.shape[1:])")),
               wrong("G of the z", **step(again="g")),
               wrong("drift of y is not", **step(slope_y="input_gradient(H, g + y) + 2 * m.prior * y")),
               wrong("drift of y is not", **step(slope_y="input_gradient(H, y) / m.t + 2 * m.prior * y")),
               wrong("under its prior", **step(slope_y="input_gradient(H, g + y) / m.t")),
               wrong("along it 0.50", **step(slope_y="input_gradient(H, g + y) / m.t + m.prior * y")),
               wrong("mind that T", **step(slope_y="(input_gradient(H, g + y) + 2 * m.prior * y) / m.t")),
               wrong("goes up", **step(slope_y="input_gradient(H, g + y) / m.t - 2 * m.prior * y")),
               wrong("has just gone", **step(slope_y="input_gradient(H, state[1] + y) / m.t + 2 * m.prior * y")),
               wrong("has just gone", hat_step=Y_FIRST),
               wrong("has just gone", hat_step=Y_FIRST.replace("+ old", "+ y")),
               wrong("tensors of the state", hat_step=IN_PLACE.format(**USUAL)),
               wrong("steep slope moves y", **step(clip="pass")),
               wrong("steep slope moves y", **step(clip="down = down.clamp(-CLIP, CLIP)")),
               wrong("by itself", **step(clip="down = down * (CLIP / down.norm().clamp(min=CLIP))")),
               wrong("each image has its own", **step(clip="down = down * (CLIP / lengths(down).max()"
                                                      ".clamp(min=CLIP))")),
               wrong("by itself", **step(clip="down = down * (CLIP / lengths(down)).view(-1, 1, 1, 1)")),
               wrong("the whole slope", **step(clip="p = m.tau_y ** 2 * m.prior * y; down = down - p; down = p + "
                                                    + USUAL["clip"].removeprefix("down = "))),
               wrong("noise of y is clipped", hat_step=STEP.format(**{**USUAL, "clip": "down = down + m.tau_y * "
                     "torch.randn_like(y); " + USUAL["clip"], "noise_y": "0"})),
               wrong("z is clipped", **step(slope_z="input_gradient(lambda z: H(G(z) + y), z) / m.t; slope = slope * "
                                            "(2 * CLIP / lengths(m.tau_z ** 2 * slope).clamp(min=2 * CLIP))"
                                            ".view(-1, 1)")),
               wrong("leaves gradients", hat_step=BACKWARD)]),
    "hat_ebm-3": Solution(
        right=[{"swaps": [(BUG, "bank_x[rows] = z, x")]},
               exchange(OLD, "bank_z.index_copy_(0, rows, z)", "bank_x.index_copy_(0, rows, x)", "return old"),
               {"swaps": [(ROWS, ROWS + ".sort().values")]}],
        wrong=[wrong("never enters", **exchange(OLD, "return old")),
               wrong("not made together", **exchange(OLD, "bank_x[rows] = x", "return old")),
               wrong("not made together", **exchange(OLD, "bank_z[rows] = z", "return old")),
               wrong("this very update", **exchange("bank_z[rows], bank_x[rows] = z, x",
                                                    "return bank_z[rows], bank_x[rows]")),
               wrong("twice", **exchange(OLD, "rows = torch.randperm(len(bank_z))[: len(z)]",
                                         "bank_z[rows], bank_x[rows] = z, x", "return old")),
               wrong("not made together", **exchange(OLD, "rows = rows.sort().values", "bank_z[rows] = z",
                                                     "bank_x[rows.flip(0)] = x", "return old")),
               wrong("should be about 4", swaps=[(BUG, "bank_x[rows] = z, x"),
                                                 (ROWS, "rows = torch.arange(s.batch)")])]),
    "hat_ebm-4": Solution(
        right=[mixed(HALF, SWAP, JOIN),
               mixed(HALF, "old_z, old_x = bank_z[rows], bank_x[rows]", "bank_z[rows] = z[:half]",
                     "bank_x[rows] = chains[:half]",
                     "z, chains = torch.cat([old_z, z[half:]]), torch.cat([old_x, chains[half:]])")],
        wrong=[wrong("overwritten", **mixed(HALF, SWAP, "old_z, old_x = bank_z[rows], bank_x[rows]", JOIN)),
               wrong("0.0 of 8", **mixed(ROWS, "z, chains = exchange(bank_z, bank_x, rows, z, chains)")),
               wrong("not from a batch", **mixed(ROWS, "old_z, old_x = exchange(bank_z, bank_x, rows, z, chains)",
                                                 "z, chains = torch.cat([z, old_z]), torch.cat([chains, old_x])")),
               wrong("twice", **mixed(HALF, SWAP.replace("half:", ":half"), JOIN)),
               wrong("twice", **mixed(ROWS, SWAP.replace("[half:]", ""),
                                     "old_z, old_x = old_z[:half], old_x[:half]", JOIN)),
               wrong("for ever", **mixed(HALF, "old_z, old_x = bank_z[rows], bank_x[rows]", JOIN)),
               wrong("not made together", **mixed(HALF, SWAP, JOIN.replace("chains[:half], old_x",
                                                                          "old_x, chains[:half]"))),
               wrong("about 8", **mixed("rows = torch.arange(half)", SWAP, JOIN)),
               wrong("no longer", swaps=[('if pairs == "historical":', 'if pairs != "inferred":'),
                                         ('z, chains = exchange(bank_z, bank_x, rows, z, chains)',
                                          'half = s.batch // 2\n                rows = rows[:half]\n                '
                                          + SWAP + "\n                " + JOIN)])]),
}
