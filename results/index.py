"""Write results/INDEX.md, from every numbered item of the two sources to the code: python results/index.py

An item is (kind and number, what it says, where it is): places are "script.function" or "script.Class.method",
separated by blanks, then the flags that their commands need; where there is none, why. Lines and commands are
looked up.
"""
import ast
import functools
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

REVIEW = "-: background that the source reviews; no method of its own"

DISSERTATION = [
    ("Algorithm 1", "maximin: adversarial training with a fixed K", "at_gen.train_f toy2d.maximin"),
    ("Algorithm 2", "minimax: particles that are moved and kept", "toy2d.minimax"),
    ("Algorithm 3", "progressive K", "at_gen.train_f at_gen.steps_of_update"),
    ("Eq. 2.1", "density from an energy", "toy2d.langevin_2d"),
    ("Eq. 2.2", "gradient of an energy-based model's likelihood", "toy2d.ebm_loss"),
    ("Eq. 2.3", "Langevin step", "toy2d.langevin_2d"),
    ("Eq. 2.4", "objective of binary adversarial training", "at_gen.at_loss at_gen.pgd_attack"),
    ("Eq. 2.5", "D = sigmoid(f)", "at_gen.at_loss"),
    ("Eq. 2.6", "PGD on log(1 - D)", "-: (2.7) takes the same steps, by its own derivation"),
    ("Eq. 2.7", "PGD on f, in a ball", "at_gen.pgd_attack_step"),
    ("Eq. 2.8", "the same without a ball", "at_gen.pgd_attack_step toy2d.pgd_2d"),
    ("Eq. 2.9", "density of the attacked distribution", "-: a definition; the attack moves samples and needs no density"),
    ("Eq. 2.10", "what the attack solves", "at_gen.pgd_attack"),
    ("Eq. 2.11", "what D solves then", "at_gen.at_loss"),
    ("Eq. 2.12", "the pay-off U, and the game of maximin", "toy2d.payoff toy2d.maximin"),
    ("Eq. 2.13", "proof of Prop. 1: the best p_T", "-: a step of a proof"),
    ("Eq. 2.14", "proof of Prop. 1: maximin as a maximum", "-: a step of a proof"),
    ("Eq. 2.15", "proof of Prop. 1: at most -log 4", "toy2d.figure_2_1"),
    ("Eq. 2.16", "Prop. 1: D at the optimum", "toy2d.figure_2_1"),
    ("Eq. 2.17", "game of a GAN", "hat_ebm.train_sngan"),
    ("Eq. 2.18", "the objective's gradient: what weighs data and attacked images", "toy2d.objectives at_gen.at_loss"),
    ("Eq. 2.19", "the same", "hat_ebm.train_sngan"),
    ("Eq. 2.20", "game of a GAN, with its distribution", "toy2d.minimax"),
    ("Figure 2.1", "maximin in the plane", "toy2d.figure_2_1"),
    ("Figure 2.2", "minimax in the plane", "toy2d.figure_2_2"),
    ("Figure 2.3", "diversity of p0", "at_gen.figure_2_3"),
    ("Figure 2.4", "Frechet distance against K", "-: commands in the head of at_gen.py (--k-min, --k-max); not run at their size"),
    ("Figure 2.5", "progressive against fixed K", "-: commands in the head of at_gen.py (--k-min, --k-max); not run at their size"),
    ("Figure 2.6", "R1 and pretraining", "at_gen.r1_penalty at_gen.pretrain"),
    ("Figure 2.7", "samples", "at_gen.figure_2_7"),
    ("Figure 2.8", "source images and samples, 256 pixels", "at_gen.figure_2_7 --dataset celebahq"),
    ("Figure 2.9", "samples from blurred seeds", "at_gen.figure_2_9"),
    ("Figure 2.10", "samples, cats and churches", "at_gen.figure_2_7 --dataset afhq_cat"),
    ("Figure 2.11", "image translation", "at_gen.figure_2_11"),
    ("Figure 2.12", "image translation, uncurated", "at_gen.figure_2_12"),
    ("Figure 2.13", "denoising and inpainting", "at_gen.table_2_7 at_gen.table_2_8"),
    ("Figure 2.14", "inpainting by nearest neighbours", "at_gen.table_2_8"),
    ("Figure 2.15", "nearest neighbours of samples", "at_gen.figure_2_15"),
    ("Figure 2.16", "interpolation", "at_gen.figure_2_16"),
    ("Figure 2.17", "nearest neighbours, 256 pixels", "at_gen.figure_2_15 --dataset celebahq"),
    ("Table 2.1", "binary AT and maximum likelihood", "toy2d.samplers"),
    ("Table 2.2", "network for 256 pixels", "at_gen.ResBlockD"),
    ("Table 2.3", "training", "at_gen.SETTINGS"),
    ("Table 2.4", "sampling", "at_gen.SETTINGS"),
    ("Table 2.5", "FID and IS, CIFAR-10", "at_gen.table_2_5 --dataset cifar10"),
    ("Table 2.6", "FID, 256 pixels", "at_gen.table_2_5 --dataset celebahq"),
    ("Table 2.7", "SSIM of denoised images", "at_gen.table_2_7"),
    ("Table 2.8", "SSIM of inpainted images", "at_gen.table_2_8"),
    ("Table 2.9", "steps of methods", "at_gen.SETTINGS"),
    ("Table 2.10", "seconds of methods", "at_gen.table_2_10"),
    ("Table 2.11", "steps against their length", "at_gen.table_2_11"),
    *[(f"Eq. 3.{i}", what, REVIEW) for i, what in (
        (1, "linear function"), (2, "its largest change"), (3, "Taylor expansion"), (4, "largest change by it"),
        (6, "smallest untargeted perturbation"), (7, "L-BFGS attack"),
        (8, "DeepFool, linear"), (9, "DeepFool, general"), (10, "DeepFool, iterated"))],
    ("Eq. 3.5", "smallest targeted perturbation", "adv_detect.smallest_perturbation"),
    ("Eq. 3.11", "the same, its length weighed against a loss (CW)", "adv_detect.near_loss"),
    ("Eq. 3.12", "attack within a ball", "adv_detect.against"),
    ("Eq. 3.13", "FGSM", REVIEW),
    ("Eq. 3.14", "PGD, l_inf", "adv_detect.attack_step"),
    ("Eq. 3.15", "PGD, l_2", "adv_detect.attack_step"),
    ("Eq. 3.16", "adversarial training of a classifier", "common.train_classifier adv_detect.against"),
    ("Eq. 3.17", "attack on classifier and detector at once", REVIEW),
    ("Eq. 3.18", "classifier and detector as one", REVIEW),
    ("Eq. 3.19", "accuracy of integrated detection", "adv_detect.figure_3_2"),
    ("Eq. 3.20", "detectors against fixed adversarial examples", "-: replaced by (3.23) in the source itself"),
    ("Eq. 3.21", "detectors against attacks that must fool f, too", "-: replaced by (3.23) in the source itself"),
    ("Eq. 3.22", "the same without that constraint; f picks the images", "-: replaced by (3.23) in the source itself"),
    ("Eq. 3.23", "the same, labels pick the images", "adv_detect.train_detectors"),
    ("Eq. 3.24", "prediction without f", "adv_detect.detect"),
    ("Eq. 3.25", "d_k as a density", "adv_detect.detect"),
    ("Eq. 3.26", "its normalisation", "-: not computable; the source takes all for equal here"),
    ("Eq. 3.27", "generative classifier", "adv_detect.detect"),
    ("Eq. 3.28", "true positive rate", "adv_detect.threshold"),
    ("Eq. 3.29", "false positive rate", "adv_detect.fpr_row"),
    ("Eq. 3.30", "attack on f", "adv_detect.classifier_loss"),
    ("Eq. 3.31", "z_H", "adv_detect.Detectors"),
    ("Eq. 3.32", "attack on the detectors", "adv_detect.detector_loss"),
    ("Eq. 3.33", "f and detectors as one classifier", "adv_detect.combined_loss"),
    ("Eq. 3.34", "attack on it", "adv_detect.combined_loss"),
    ("Eq. 3.35", "attack on f, then on the detectors", "adv_detect.switching_loss"),
    ("Eq. 3.36", "out-distribution adversarial training", "ood_detect.train"),
    ("Eq. 3.37", "softmax", REVIEW),
    ("Eq. 3.38", "Bayes' theorem", REVIEW),
    ("Eq. 3.39", "objective of d_k", "gen_classify.train_d"),
    ("Eq. 3.40", "density of a class", "gen_classify.Generative"),
    ("Eq. 3.41", "its normalisation", "-: not computable; c is learned instead"),
    ("Eq. 3.42", "Bayes' rule", "gen_classify.Generative"),
    ("Eq. 3.43", "the classifier", "gen_classify.Generative gen_classify.calibrate"),
    ("Eq. 3.44", "when it is right under attack", "gen_classify.unbroken"),
    ("Eq. 3.45", "combined adversarial training", "gen_classify.train_d"),
    ("Eq. 3.46", "attack on the softmax classifier", "gen_classify.entropy_attack"),
    ("Eq. 3.47", "attack on each d_k", "gen_classify.class_attack"),
    ("Eq. 3.48", "the strongest of them", "gen_classify.likest_images gen_classify.source_attack"),
    ("Figure 3.1", "a scheme of the method", "-: a drawing"),
    ("Figure 3.2", "integrated and generative detection", "adv_detect.figure_3_2"),
    ("Figure 3.3", "targeted attacks", "adv_detect.figure_3_3"),
    ("Figure 3.4", "figure 3.2 on CIFAR-10", "adv_detect.figure_3_2 --dataset cifar10"),
    ("Figure 3.5", "figure 3.3 on CIFAR-10", "adv_detect.figure_3_3 --dataset cifar10"),
    ("Figure 3.6", "images from Gaussian seeds", "adv_detect.figure_3_6"),
    ("Figure 3.7", "accuracy against the radius", "gen_classify.figure_3_7"),
    ("Figure 3.8", "samples", "gen_classify.figure_3_8"),
    ("Figure 3.9", "counterfactuals", "gen_classify.figure_3_9"),
    ("Figure 3.10", "integrated gradients", "gen_classify.figure_3_10"),
    ("Figure 3.11", "histograms of d_k", "gen_classify.figure_3_11"),
    ("Figure 3.12", "capacity, and weight decay", "gen_classify.figure_3_12"),
    ("Figure 3.13", "radius in training", "gen_classify.figure_3_13"),
    ("Figure 3.14", "augmentation", "gen_classify.figure_3_14"),
    ("Figure 3.15", "combined or out-distribution training", "gen_classify.figure_3_15"),
    ("Table 3.1", "models on MNIST", "adv_detect.table_3_1 --dataset mnist --models all"),
    ("Table 3.2", "AUC under Adam", "adv_detect.table_3_2 --dataset mnist --models all"),
    ("Table 3.3", "AUC under plain steps", "adv_detect.table_3_3 --dataset mnist --models all"),
    ("Table 3.4", "crossed attacks", "adv_detect.table_3_4 --dataset mnist --models all"),
    ("Table 3.5", "restarts", "adv_detect.table_3_5 --dataset mnist --models all"),
    ("Table 3.6", "smallest perturbation", "adv_detect.table_3_6 --dataset mnist --models all"),
    ("Table 3.7", "steps, CIFAR-10, l_inf", "adv_detect.table_3_7 --dataset cifar10"),
    ("Table 3.8", "steps, CIFAR-10, l_2", "adv_detect.table_3_7 --dataset cifar10"),
    ("Table 3.9", "crossed attacks, CIFAR-10", "adv_detect.table_3_4 --dataset cifar10"),
    ("Table 3.10", "restarts, CIFAR-10", "adv_detect.table_3_5 --dataset cifar10"),
    ("Table 3.11", "smallest perturbation, CIFAR-10", "adv_detect.table_3_6 --dataset cifar10"),
    ("Table 3.12", "worst-case detection, CIFAR-10", "ood_detect.table_3_12 --dataset cifar10"),
    ("Table 3.13", "worst-case detection, 256 pixels", "ood_detect.table_3_13 --dataset celebahq"),
    ("Table 3.14", "accuracy, CIFAR-10", "gen_classify.table_3_14 --dataset cifar10"),
    ("Table 3.15", "FID of samples and counterfactuals", "gen_classify.table_3_15"),
    ("Table 3.16", "accuracy before and after calibration", "gen_classify.table_3_16"),
    ("Table 3.17", "the constants", "gen_classify.table_3_17"),
]

THESIS = [
    ("Algorithm 1", "the attack", "stochastic_security.eot_attack"),
    ("Algorithm 2", "convergent energy: Adam, then SGD", "stochastic_security.train_ebm"),
    ("Algorithm 3", "the attack, mid-run", "lifecycle_midrun.eot_attack"),
    ("Algorithm 4", "mid-run energy", "lifecycle_midrun.train_midrun"),
    ("Algorithm 5", "conditional Hat EBM for synthesis", "hat_ebm.train_hat"),
    ("Eq. 1.1", "adversarial training", "common.train_classifier stochastic_security.pgd"), ("Eq. 1.2", "FGSM", REVIEW),
    ("Eq. 1.3", "PGD", "stochastic_security.pgd_step"),
    ("Eq. 1.4", "BPDA", "stochastic_security.Defence.gradient"),
    *[(f"Eq. 1.{i}", what, REVIEW) for i, what in (
        (5, "Kullback-Leibler divergence"), (6, "its two parts"), (7, "likelihood"), (8, "likelihood"),
        (9, "likelihood of an energy"))],
    ("Eq. 1.10", "its gradient", "stochastic_security.train_ebm"),
    ("Eq. 1.11", "its gradient, estimated", "stochastic_security.train_ebm"),
    ("Eq. 1.12", "Langevin step", "stochastic_security.langevin_step"),
    *[(f"Figure 1.{i}", what, "-: a drawing") for i, what in (
        (1, "what the thesis covers"), (2, "an attacked image"), (3, "a scheme of purification"))],
    ("Eq. 2.1", "density from an energy", "stochastic_security.langevin"),
    ("Eq. 2.2", "gradient of the likelihood", "stochastic_security.train_ebm"),
    ("Eq. 2.3", "Langevin step", "stochastic_security.langevin_step"),
    ("Eq. 2.4", "the defended classifier", "stochastic_security.Defence"),
    ("Eq. 2.5", "F_H", "stochastic_security.Defence.logits"),
    ("Eq. 2.6", "its prediction", "stochastic_security.Defence.predict"),
    ("Eq. 2.7", "what an attack solves", "stochastic_security.Defence.loss stochastic_security.eot_attack"),
    ("Eq. 2.8", "PGD in a ball of any norm", "stochastic_security.LInf.ascend stochastic_security.L2.ascend"),
    ("Eq. 2.9", "EOT", "stochastic_security.Defence.gradient"),
    ("Eq. 2.10", "BPDA+EOT", "stochastic_security.Defence.gradient"),
    ("Eq. 2.11", "the Langevin equation in continuous time, with noise eta", "stochastic_security.lyapunov_step"),
    ("Eq. 2.12", "Lyapunov exponent", "stochastic_security.lyapunov"),
    ("Eq. 2.13", "Langevin step of another noise", "stochastic_security.lyapunov_step"),
    ("Figure 2.1", "a scheme of the defence", "-: a drawing"),
    ("Figure 2.2", "short- and long-run states (there: in training; here: of two finished energies)", "stochastic_security.figure_2_2"),
    ("Figure 2.3", "logits over chains (there: of two classes; here: their difference)", "stochastic_security.figure_2_3"),
    ("Figure 2.4", "accuracy against eps", "stochastic_security.figure_2_4"),
    ("Figure 2.5", "more steps, more chains", "stochastic_security.figure_2_5"),
    ("Figure 2.6", "energies of images", "stochastic_security.figure_2_6"),
    ("Figure 2.7", "Lyapunov exponents", "stochastic_security.figure_2_7"),
    ("Figure 2.8", "accuracy against K", "stochastic_security.figure_2_8"),
    ("Figure 2.9", "FID against steps", "stochastic_security.figure_2_9"),
    ("Figure 2.10", "cost of steps (there also IGEBM's and JEM's, and their samples)", "stochastic_security.figure_2_10"),
    ("Table 2.1", "transfer attack", "stochastic_security.table_2_1 --dataset cifar10"),
    ("Table 2.2", "white-box attacks, CIFAR-10", "stochastic_security.table_2_2 --dataset cifar10"),
    ("Table 2.3", "white-box attacks, SVHN and CIFAR-100", "stochastic_security.table_2_2 --dataset svhn"),
    ("Eq. 3.1", "the defended classifier", "lifecycle_midrun.Defence"),
    ("Eq. 3.2", "F_H", "lifecycle_midrun.Defence.logits"),
    ("Eq. 3.3", "BPDA+EOT", "lifecycle_midrun.Defence.gradient"),
    ("Figure 3.1", "life cycle of chains", "lifecycle_midrun.figure_3_1"),
    ("Figure 3.2", "a scheme of the bank (here: the ages of its states)", "lifecycle_midrun.rejuvenate lifecycle_midrun.figure_3_2"),
    ("Figure 3.3", "accuracy against K", "lifecycle_midrun.figure_3_3"),
    ("Figure 3.4", "the score network's chains", "lifecycle_midrun.figure_3_4"),
    ("Table 3.1", "white-box attacks, CIFAR-10", "lifecycle_midrun.table_3_1 --dataset cifar10"),
    ("Table 3.2", "white-box attacks, ImageNet", "lifecycle_midrun.table_3_1 --dataset imagenet"),
    ("Table 3.3", "stronger attacks, ImageNet", "lifecycle_midrun.table_3_3 --dataset imagenet"),
    ("Eq. 4.1", "prediction", "lifecycle_midrun.Defence.predict"),
    ("Eq. 4.2", "Dice", "lifecycle_midrun.dice"),
    ("Eq. 4.3", "when a segmentation is right", "lifecycle_midrun.Segmenter.right"),
    ("Table 4.1", "one energy, other classifiers", "lifecycle_midrun.table_4_1"),
    ("Table 4.2", "segmentation", "lifecycle_midrun.table_4_2"),
    ("Eq. 5.1", "the fixed classifier", "fixer.behind fixer.Defence"),
    ("Eq. 5.2", "F_H", "fixer.Defence.logits"),
    ("Eq. 5.3", "squared error, phase 1", "fixer.train_phase"),
    ("Eq. 5.4", "perceptual loss", "fixer.perceptual_loss"),
    ("Figure 5.1", "a scheme of the Fixer", "-: a drawing"),
    ("Figure 5.2", "losses", "fixer.figure_5_2"),
    ("Figure 5.3", "attacked, purified, fixed", "fixer.figure_5_3"),
    ("Table 5.1", "white-box attacks, ImageNet", "fixer.table_5_1 --dataset imagenet"),
    ("Eq. 6.1", "density from an energy", "hat_ebm.hat_step"),
    ("Eq. 6.2", "gradient of the likelihood", "hat_ebm.train_hat"),
    ("Eq. 6.3", "Langevin step", "hat_ebm.hat_step"),
    ("Eq. 6.4", "the joint energy", "hat_ebm.hat_step"),
    ("Eq. 6.5", "its density", "hat_ebm.walk"),
    ("Eq. 6.6", "step of the residual", "hat_ebm.hat_step"),
    ("Eq. 6.7", "step of the latent", "hat_ebm.hat_step"),
    ("Eq. 6.8", "learning", "hat_ebm.train_hat"),
    ("Eq. 6.9", "the conditional model: latents are drawn and stay", "hat_ebm.walk"),
    ("Eq. 6.10", "cooperative learning: inference", "hat_ebm.infer_step"),
    ("Eq. 6.11", "cooperative learning: the generator", "hat_ebm.train_hat"),
    ("Eq. 6.12", "the generator learns from the ends of chains (sec. 6.4.5: past ones)", "hat_ebm.train_hat hat_ebm.exchange"),
    ("Eq. 6.13", "energy of the latent alone", "hat_ebm.figure_6_6"),
    ("Eq. 6.14", "the same in the appendix", "hat_ebm.figure_6_6"),
    ("Figure 6.1", "the residual, between two manifolds", "-: a drawing"),
    ("Figure 6.2", "a scheme of the model, and samples of ImageNet", "hat_ebm.figure_6_9 --dataset imagenet"),
    ("Figure 6.3", "a scheme of training", "-: a drawing"),
    ("Figure 6.4", "samples of learning methods", "hat_ebm.figure_6_4"),
    ("Figure 6.5", "paths of chains", "hat_ebm.figure_6_5"),
    ("Figure 6.6", "without the residual", "hat_ebm.figure_6_6"),
    ("Figure 6.7", "without the residual, appendix", "hat_ebm.figure_6_6"),
    ("Figure 6.8", "retrofit", "hat_ebm.figure_6_8"),
    *[(f"Figure 6.{i}", f"samples of {dataset}", f"hat_ebm.figure_6_9 --dataset {dataset}") for i, dataset in (
        (9, "cifar10"), (10, "celeba"), (11, "imagenet"))],
    ("Table 6.1", "refinement", "hat_ebm.table_6_1"),
    ("Table 6.2", "synthesis", "hat_ebm.table_6_2"),
    ("Table 6.3", "out-of-distribution detection", "hat_ebm.table_6_3"),
]


@functools.cache
def body_of(script):
    """The top of a script's syntax tree."""
    return ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8")).body


def line_of(place):
    """The line on which "script.name" or "script.Class.method" begins; KeyError where there is none."""
    script, *names = place.split(".")
    body = body_of(script)
    for name in names:
        found = None
        for node in body:
            targets = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            if getattr(node, "name", None) == name or name in targets:
                found = node
        if found is None:
            raise KeyError(place)
        body = getattr(found, "body", [])
    return found.lineno


def places_of(text):
    """The places of an item, a list, and the flags of its commands, a string."""
    places, *flags = text.split(" --", 1)
    return places.split(), "".join(f" --{flag}" for flag in flags)


def command_of(place, flags=""):
    """The command that makes a table or a figure; "" for anything else."""
    script, name = place.split(".")[:2]
    kind, *number = name.split("_")
    if kind in ("table", "figure"):
        return f"`python {script}.py --only {kind}{'.'.join(number)}{flags}`"
    return ""


def rows(items):
    """Lines of a Markdown table."""
    lines = ["| item | what it says | where | command |", "|---|---|---|---|"]
    for item, what, text in items:
        if text.startswith("-"):
            lines.append(f"| {item} | {what} | not here: {text[3:]} | |")
            continue
        links, commands = [], []
        places, flags = places_of(text)
        for place in places:
            script, name = place.split(".", 1)
            links.append(f"[{script}.{name}](../{script}.py#L{line_of(place)})")
            if command_of(place):
                commands.append(command_of(place, flags))
        lines.append(f"| {item} | {what} | {', '.join(links)} | {' '.join(commands)} |")
    return lines


def index():
    """INDEX.md as it ought to be."""
    return "\n".join([
        "# From equation to code", "",
        "Every numbered algorithm, equation, figure and table of both sources. Made by `python results/index.py`.", "",
        "## Yin 2022, *Generative Modeling With Adversarial Training*", "", *rows(DISSERTATION), "",
        "## Mitchell 2022, *Adversarial Attacks and Defense using Energy-Based Image Models*", "", *rows(THESIS), ""])


if __name__ == "__main__":
    (HERE / "INDEX.md").write_text(index(), encoding="utf-8")
