"""The ablations' tables: means, paired differences and their 95 % confidence intervals over seeds and prompts."""
import torch

from gto.summary import markdown

CONTROLS = "control", "control-sharp", "control-soft", "control-deep"
TITLES = {"objectives": "Objectives, and the continuation of token-level training (Table 6)",
          "groups": "Group size, 128 positions per sequence in all (Table 4; m=8 is gto)",
          "aggregator": "Aggregator of the reward (Table 3; lse is gto)", "debias": "Debiasing (Table 5)",
          "omega": "Weight of the GTO loss (omega=0.5 is gto), and its gradient clipped alone"}
BESIDE = {"objectives": ["draft"], "groups": ["control", "gto"], "aggregator": ["control", "gto"],
          "debias": ["control", "gto"], "omega": ["control", "gto"]}
# 97.5 % points of Student's t by degrees of freedom; in between the one before holds, which is the wider
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04}


def interval(difference):
    """Mean and half width of the 95 % interval of a difference [seeds, prompts], both taken for samples.

    The variance of the mean is that over seeds plus that over prompts: what belongs to neither is in both, so the
    interval is rather too wide. Degrees of freedom by Welch and Satterthwaite. One seed: only the prompts' share.
    """
    S, P = difference.shape
    parts = [(difference.mean(1).var().item() / S, S - 1)] if S > 1 else []
    parts += [(difference.mean(0).var().item() / P, P - 1)] if P > 1 else []
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return difference.mean().item(), 0.0
    freedom = variance ** 2 / sum(part ** 2 / df for part, df in parts)
    quantile = STUDENT[max(df for df in STUDENT if df <= max(freedom, 1))]
    return difference.mean().item(), quantile * variance ** 0.5


def taus(results, name, T):
    """{seed: tau [prompts]} of a recipe's finished runs."""
    return {run["seed"]: torch.tensor(run[f"T={T}"]["tau"], dtype=torch.float64) for run in results.get(name, [])}


def over(results, name, other, T):
    """'+0.031 ± 0.020 (+0.8 %)': a recipe's tau less another's, paired by seed and prompt. '' if they share no seed."""
    a, b = taus(results, name, T), taus(results, other, T)
    if name == "draft":
        a = {seed: a[0] for seed in b}
    seeds = sorted(a.keys() & b.keys())
    if not seeds or name == other:
        return ""
    mean, half = interval(torch.stack([a[s] - b[s] for s in seeds]))
    base = torch.stack([b[s] for s in seeds]).mean().item()
    return f"{mean:+.3f} ± {half:.3f} ({100 * mean / base:+.1f} %)"


def mean_tau(results, name, T):
    return torch.stack(list(taus(results, name, T).values())).mean().item()


def best_control(results, T):
    """The continuation of token-level training with the largest tau, of those with most seeds; None without any."""
    there = [name for name in CONTROLS if results.get(name)]
    most = max((len(results[name]) for name in there), default=0)
    there = [name for name in there if len(results[name]) == most]
    return max(there, key=lambda name: mean_tau(results, name, T), default=None)


def recipe_table(results, names):
    best = {T: best_control(results, T) for T in (0, 1)}
    header = ["", "seeds"]
    for T in (0, 1):
        header += [f"tau, T={T}", "score temp.", f"over {best[T] or 'control'}"]
    rows = []
    for name in names:
        runs = results.get(name)
        if not runs:
            continue
        row = [name, str(len(runs))]
        for T in (0, 1):
            temps = sorted({run[f"T={T}"]["score_temp"] for run in runs})
            difference = over(results, name, best[T], T) if best[T] else ""
            row += [f"{mean_tau(results, name, T):.3f}", ", ".join(f"{t:g}" for t in temps), difference]
        rows.append([*row, str(runs[0]["steps"]), f"{sum(run['seconds'] for run in runs) / len(runs):.0f}"])
    return markdown([*header, "steps", "training, s"], rows) if rows else ""


def gap(results):
    """How far the best control is from the target's own drafts."""
    lines = []
    for T in (0, 1):
        best = best_control(results, T)
        if best:
            ceiling = torch.tensor(results["draft"][0][f"T={T}"]["self"]).mean()     # of every other prompt
            control = torch.stack(list(taus(results, best, T).values()))[:, ::2].mean()
            lines.append(f"* T={T}: the target drafting for itself has tau {ceiling:.3f},"
                         f" {100 * (ceiling / control - 1):.1f} % over {best}; a third of that gap is {(ceiling - control) / 3:+.3f}.")
    return "\n".join(lines)


def trees_table(results):
    """Table 7: other trees at inference, the heads trained with the one."""
    rows = []
    for T in (0, 1):
        by_name = {name: {run["seed"]: run[f"T={T}"]["trees"] for run in results.get(name, [])}
                   for name in ("control", "gto")}
        seeds = sorted(by_name["control"].keys() & by_name["gto"].keys())
        for tree in by_name["control"][seeds[0]] if seeds else []:
            control, gto = (torch.tensor([by_name[name][s][tree] for s in seeds]) for name in ("control", "gto"))
            mean, half = interval(gto - control)
            rows.append([str(T), tree, f"{control.mean():.3f}", f"{gto.mean():.3f}", f"{mean:+.3f} ± {half:.3f}"])
    return markdown(["T", "tree", "control", "gto", "difference"], rows) if rows else ""


def calibration_control(results, config):
    """Labels and scores sharpened, T=0: a score temperature gives for nothing what sharper labels are trained for."""
    rows = []
    for name in ("draft", *CONTROLS, "gto", "gto-sharp"):
        if runs := results.get(name):
            labels = runs[0].get("changes", {}).get("label_temperature", config.label_temperature)
            tuned = [run["T=0"]["tuned"] for run in runs]
            rows.append([name, f"{labels:g}", *(f"{sum(t[s] for t in tuned) / len(tuned):.3f}" for s in tuned[0])])
    return markdown(["T=0", "label temp.", *(f"score temp. {s}" for s in results["draft"][0]["T=0"]["tuned"])], rows)


def tables(results, recipes, config):
    """results as `ablate.read_results` gives them; recipes {table: names} -> Markdown. Shows what is there so far."""
    prompts = len(results["draft"][0]["T=0"]["tau"])
    parts = [f"Acceptance length tau, tree {config.tree}, {prompts} held-out prompts x {config.eval_tokens} tokens."
             " Differences are paired by prompt and seed, with 95 % confidence intervals over both."
             " Every head has its best score temperature, chosen on other prompts.", ceilings(results["draft"][0], config)]
    for title, names in recipes.items():
        if any(results.get(name) for name in names):
            parts.append(f"### {TITLES[title]}\n\n{recipe_table(results, [*BESIDE[title], *names])}")
            if title == "objectives":
                parts.append(gap(results))
    if trees := trees_table(results):
        parts.append("### Other trees at inference (Table 7), on the prompts that choose the score temperature\n\n" + trees)
    parts.append("### Score temperature against label temperature, on the prompts that choose the first\n\n"
                 + calibration_control(results, config))
    return "\n\n".join(parts)


def ceilings(record, config):
    """What the phase-I head has, what it could have at most, and what its scores are worth. record: of `phase I`."""
    rows, lines = [], ["### Ceilings\n"]
    for T in (0, 1):
        entry = record[f"T={T}"]
        tau, rerank, own = (torch.tensor(entry[key], dtype=torch.float64) for key in ("tau", "rerank", "self"))
        rows.append([str(T), f"{tau.mean():.3f}", f"{tau[::2].mean():.3f}", f"{entry['score_temp']:g}",
                     *(f"{x.mean():.3f} ({100 * (x.mean() / tau[::2].mean() - 1):+.1f} %)" for x in (rerank, own)),
                     f"{entry['distinct']:.0f} of {config.eval_tokens}"])
    lines.append(markdown(["T", "draft", "on every other prompt", "score temp.",
                           "its candidates, ranked by the target", "the target drafts for itself", "distinct tokens"], rows))
    columns = [(T, s, table) for T in (0, 1) for s, table in record[f"T={T}"]["calibration"].items()]
    header, body = ["rank"], []
    for T, s, _ in columns:
        header += [f"exp(score), T={T}, score temp. {s}", "accepted"]
    for i, (first, last, *_) in enumerate(columns[0][2]):
        row = [f"{first}" if first == last else f"{first}..{last}"]
        for *_, table in columns:
            row += [f"{table[i][2]:.3f}", f"{table[i][3]:.3f}"]
        body.append(row)
    lines += ["\nCalibration, by rank among a draft's candidates: what a score promises, what is accepted.\n",
              markdown(header, body)]
    return "\n".join(lines)
