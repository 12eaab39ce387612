"""What a grid of runs says: latent gain share and the rest as tables (quality.md), rows (quality.json) and a plot.

latent gain share = (NLL control - NLL variant) / (NLL control - NLL token model), of one seed: which part of what the whole
context is worth beyond the control's few tokens - the control is the same model without latents - a variant wins.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import read_json, replace_text
from tools.grid import Grid
from tools.metrics import BUCKETS
from tools.plot import frontier, quality_curves

Row = dict[str, Any]
INTRO = "# Quality\n"
HIDDEN = ("identity", "checkpoint")  # what only a rerun needs


def gain_share(row: Row, control: Row | None, token_model: Row | None) -> tuple[float | None, str | None]:
    """The latent gain share of a run, or None and the reason why there is none."""
    if control is None or token_model is None:
        return None, f"control or token model have no run with seed {row['seed']}"
    nlls = [r.get("nats_per_token") for r in (row, control, token_model)]
    own, local, full = nlls
    if own is None or local is None or full is None:
        return None, "it has no likelihood"
    if len({(r["windows"], r["tokens"]) for r in (row, control, token_model)}) > 1:
        return None, "scored on other tokens than control and token model"
    if local <= full:
        return None, f"the control ({local:.4f} nats) is no worse than the token model ({full:.4f}): nothing to win"
    return (local - own) / (local - full), None


def has_latents(row: Row) -> bool:
    return row["model"] == "student" and row["settings"].get("latents") != "none"


def mean(values: list[Any]) -> float | None:
    """Of what is known; None where nothing is."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def summary(
    rows: list[Row], roles: dict[str, str | None], controls: dict[str, str], token_models: dict[str, str]
) -> list[dict[str, Any]]:
    """One entry a variant: the means of its seeds' figures, and how it stands to control and token model seed by seed."""
    no_share = {roles["control"], *controls.values(), *(row["name"] for row in rows if not has_latents(row))}
    by_run = {(row["name"], row["seed"]): row for row in rows}
    out = []
    for name in dict.fromkeys(row["name"] for row in rows if row["model"] != "ae"):
        mine = [row for row in rows if row["name"] == name]
        against = (controls.get(name, roles["control"]), token_models.get(name, roles["token_model"]))
        references = [[by_run.get((other, row["seed"])) for other in against] for row in mine]
        shares = [gain_share(row, *both) for row, both in zip(mine, references, strict=True)]
        ratios = [
            row["bits_per_byte"] / full["bits_per_byte"] if full and row["bits_per_byte"] and full["bits_per_byte"] else None
            for row, (_, full) in zip(mine, references, strict=True)
        ]
        entry: dict[str, Any] = {"name": name, "seeds": [row["seed"] for row in mine]}
        if name not in no_share:
            entry |= {"control": against[0]}
            entry |= {"latent_gain_share": mean([share for share, _ in shares])}
            entry |= {"latent_gain_share_by_seed": [share for share, _ in shares]}
            entry |= {"latent_gain_share_reason": next((reason for _, reason in shares if reason), None)}
        entry |= {"token_model": against[1], "bits_per_byte_ratio": mean(ratios), "bits_per_byte_ratio_by_seed": ratios}
        for key in (
            "bits_per_byte", "nats_per_token", "brier_lm", "brier_lm_all", "latent_swap_cost", "nll_far_copy", "kl_to_teacher",
            "training_tokens", "train_flops", "inherited_flops", "train_seconds", "k", "backbone_steps_per_token",
        ):  # fmt: skip
            entry[key] = mean([row.get(key) for row in mine])
        entry["known"] = {key: sum(row.get(key) is not None for row in mine) for key in ("brier_lm", "brier_lm_all")}
        entry["known"]["latent_gain_share"] = sum(share is not None for share, _ in shares)
        nats = [row["nats_per_token"] for row in mine if row["nats_per_token"] is not None]
        entry["nats_spread"] = (max(nats) - min(nats)) / 2 if len(nats) > 1 else None
        positions = [row["nll_by_position"] for row in mine if row["nll_by_position"]]
        entry["nll_by_position"] = [mean(list(column)) for column in zip(*positions, strict=True)]
        for key in ("nll_by_distance", "nll_by_seen"):
            entry[key] = {b: mean([(row.get(key) or {}).get(b) for row in mine]) for b in BUCKETS}
        entry["threads"] = sorted({row["threads"] for row in mine})
        out.append(entry)
    return out


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def shown(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def cell(entry: dict[str, Any], key: str, style: str) -> str:
    """A figure of a table, and of how many of the seeds it is the mean, where some have none."""
    told, known, seeds = shown(entry.get(key), style), entry["known"].get(key), len(entry["seeds"])
    return told if known in (None, seeds) or told == "-" else f"{told} ({known} of {seeds})"


def section(
    name: str, source: str, rows: list[Row], entries: list[dict[str, Any]], missing: list[str], plots: list[str]
) -> str:
    """A grid's part of quality.md, without its markers."""
    columns = [
        ("bits per byte", "bits_per_byte", ".4f"), ("to token model", "bits_per_byte_ratio", ".3f"),
        ("latent gain share", "latent_gain_share", ".2f"), ("other latents cost", "latent_swap_cost", ".3f"),
        ("far words, nats", "nll_far_copy", ".3f"), ("KL to teacher", "kl_to_teacher", ".4f"),
        ("BrierLM, chunk start", "brier_lm", ".2f"), ("BrierLM, all", "brier_lm_all", ".2f"),
        ("backbone steps a token", "backbone_steps_per_token", ".3g"),
    ]  # fmt: skip
    columns = [column for column in columns if any(entry.get(column[1]) is not None for entry in entries)]
    lines = []
    for entry in entries:
        nats = shown(entry["nats_per_token"], ".4f") + (f" ± {entry['nats_spread']:.4f}" if entry["nats_spread"] else "")
        cells = [entry["name"], str(len(entry["seeds"])), nats, *(cell(entry, key, style) for _, key, style in columns)]
        cost = entry["train_flops"] / 1e15, entry["inherited_flops"] / 1e15
        cells += [f"{entry['training_tokens'] / 1e6:.2f}", f"{cost[0]:.3g}" + (f" + {cost[1]:.3g}" if cost[1] else "")]
        lines.append([*cells, f"{entry['train_seconds']:.0f} ({', '.join(map(str, entry['threads']))})"])
    heads = ["variant", "seeds", "NLL, nats/token", *(column[0] for column in columns)]
    parts = [f"## {name}", f"`python tools/ablate.py --grid {source}`" + where(rows)]
    parts.append(markdown([*heads, "training tokens, M", "training PFLOPs", "training s (threads)"], lines))
    against: dict[str, list[str]] = {}
    for entry in entries:
        if entry.get("latent_gain_share") is not None:
            against.setdefault(entry["control"], []).append(entry["name"])
    if len(against) > 1:
        told_of = "; ".join(f"{', '.join(names)} against {control}" for control, names in against.items())
        parts.append(f"Latent gain share: {told_of}.")
    usual = max((e["token_model"] for e in entries), key=[e["token_model"] for e in entries].count, default=None)
    if others := [f"{e['name']} to {e['token_model']}" for e in entries if e["token_model"] != usual]:
        parts.append(f"To token model: {', '.join(others)}, the others to {usual}.")
    reasons = {e["name"]: e["latent_gain_share_reason"] for e in entries if e.get("latent_gain_share_reason")}
    if reasons:
        parts.append("No latent gain share: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + ".")
    if missing:
        parts.append(f"Not run with the grid's present settings: {', '.join(missing)}.")
    width = max((len(entry["nll_by_position"]) for entry in entries), default=0)
    told = [entry for entry in entries if entry["nll_by_position"]]
    places = [2**i for i in range(width.bit_length())]
    at = [[e["name"], *(shown(dict(enumerate(e["nll_by_position"], 1)).get(p), ".3f") for p in places)] for e in told]
    title = "NLL at positions of a chunk (quality.json has all of them):"
    parts += [title, markdown(["variant", *map(str, places)], at)] if told else []
    for title, key in (
        ("NLL by the tokens of its document that a token's window shows before it:", "nll_by_seen"),
        ("NLL by distance from the document's start, in the windows that show it from there on:", "nll_by_distance"),
    ):
        buckets = [b for b in BUCKETS if any(entry[key][b] is not None for entry in entries)]
        table = [[entry["name"], *(shown(entry[key][b], ".3f") for b in buckets)] for entry in told]
        counts = [told_counts for row in rows if (told_counts := row.get(key.replace("nll", "tokens")))]
        if counts and counts.count(counts[0]) == len(counts):
            table.append(["of tokens", *(f"{counts[0].get(b, 0):,}" for b in buckets)])
        parts += [title, markdown(["variant", *buckets], table)] if told and buckets else []
    parts += [f"![bits per byte]({plot})" for plot in plots]
    return "\n\n".join(parts)


def where(rows: list[Row]) -> str:
    """On what the runs were made, and from which commits."""
    places: dict[str, set[str]] = {}
    for row in rows:
        env = row["environment"]
        machine = f"{env['gpu'] or env['processor']}, torch {env['torch']}"
        places.setdefault(machine, set()).add(env["commit"] or "unknown")
    told = {m: f"commit {', '.join(sorted(c))}" if len(c) < 4 else f"{len(c)} commits" for m, c in places.items()}
    return "".join(f"; {machine}, {commits}" for machine, commits in told.items())


def write_section(path: Path, name: str, text: str) -> None:
    """Put a grid's section between its markers, or at the end where there are none; what stands around it stays."""
    begin, end = f"<!-- ablate {name}: written by tools/ablate.py -->", f"<!-- end of ablate {name} -->"
    page = path.read_text(encoding="utf-8") if path.exists() else INTRO
    block = f"{begin}\n{text}\n{end}"
    if (begin in page) != (end in page):
        raise UserError(f"{path}: only one of the two markers of {name} is there; remove it, or put the other back")
    if begin in page:
        before, rest = page.split(begin, 1)
        page = before + block + rest.split(end, 1)[1]
    else:
        page = page.rstrip("\n") + f"\n\n{block}\n"
    replace_text(path, page)


def read_page(folder: str | Path) -> dict[str, Any]:
    """quality.json: its rows and recommendation; empty where there is none."""
    path = Path(folder) / "quality.json"
    return read_json(path) if path.exists() else {}


def but_for_k(rows: list[Row], name: str) -> set[str]:
    """The variants that have this one's settings, whatever their K, which comes from the autoencoder, and compiled or not."""

    def others(row: Row) -> dict[str, Any]:
        return {key: value for key, value in row["settings"].items() if key not in ("ae_ckpt", "seq_len", "compile")}

    wanted = [others(row) for row in rows if row["name"] == name]
    return {row["name"] for row in rows if others(row) in wanted}


def write_quality(folder: str | Path, grid: Grid, rows: list[Row], missing: list[str]) -> str:
    """Write quality.md, quality.json, quality_NAME.png and, where K differs, frontier_NAME.png of a grid (of the recommended
    variant, if there is one, at every K, and the token model); returns its section.

    rows: those made with the grid's present settings; missing: titles of its other runs. What other grids wrote stays.
    """
    name, roles = grid.name, {"control": grid.control, "token_model": grid.token_model, "recommended": grid.recommended}
    controls = {variant.name: variant.control for variant in grid.variants.values() if variant.control}
    token_models = {variant.name: variant.token_model for variant in grid.variants.values() if variant.token_model}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    entries = summary(rows, roles, controls, token_models)
    curves: dict[str, list[list[tuple[float, ...]]]] = {}
    for row in rows:
        if row["model"] != "ae" and row["bits_per_byte"]:
            flops = row["train_flops"] / row["training_tokens"]
            points: list[tuple[float, ...]] = [
                (tokens, tokens * flops + row["inherited_flops"], seconds, nats) for tokens, seconds, nats in row["curve"]
            ]
            curves.setdefault(row["name"], []).append(points)
    if curves:
        quality_curves(curves, folder / f"quality_{name}.png")
    places = {
        e["name"]: (e["backbone_steps_per_token"], e["bits_per_byte"])
        for e in entries
        if e["bits_per_byte"] and e["backbone_steps_per_token"]  # without latents there is no backbone
    }
    if roles["recommended"]:
        alike = {roles["token_model"], *but_for_k(rows, roles["recommended"])}
        places = {key: place for key, place in places.items() if key in alike}
    seeds = [{row["seed"] for row in rows if row["name"] == key} for key in places]
    common = set.intersection(*seeds) if seeds else set()
    for key, (steps, _) in places.items() if common else ():  # else a variant of two seeds is held against others of one
        bits = [row["bits_per_byte"] for row in rows if row["name"] == key and row["seed"] in common]
        places[key] = steps, sum(bits) / len(bits)
    plots = [f"quality_{name}.png"] if curves else []
    if len({steps for steps, _ in places.values()}) > 2:  # of several K
        frontier(places, folder / f"frontier_{name}.png")
        plots.append(f"frontier_{name}.png")
    text = section(name, grid.path, rows, entries, missing, plots)
    page = read_page(folder)
    kept = [row for row in page.get("rows", []) if row["grid"] != name]
    page["rows"] = kept + [{key: value for key, value in row.items() if key not in HIDDEN} for row in rows]
    best = next((entry for entry in entries if entry["name"] == roles["recommended"]), None)
    if best:
        settings = next(row["settings"] for row in rows if row["name"] == best["name"])
        page["recommended"] = {"grid": name, **best, "settings": settings}
    replace_text(folder / "quality.json", json.dumps(page, indent=1) + "\n")
    write_section(folder / "quality.md", name, text)
    return text
