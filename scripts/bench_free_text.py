"""What free text costs, and what a reasoner gives back: label prompts, the words as they are, and the words through a reasoner.

    python scripts/bench_free_text.py --raw RAW/mr_hippocampus [--split test] [--limit N] [--reasoners verbatim lexicon]

Runs the MSD hippocampus set by the committed split (`seerseg_data/splits/hippocampus.json`). Per case and target: one label prompt and
eight paraphrases in fixed styles, written for this bench and used in no training. Prints per target n, mean Dice with its interval by
subject, the worst wording, the spread between wordings (ddof 0), NSD at 1 mm, and how many requests ended without a mask.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from seerseg.dataset import open_dataset
from seerseg.metrics import bootstrap_interval, dice, nsd, over_paraphrases
from seerseg.prediction import Predictor
from seerseg.volume import read_labels, read_volume

SPLIT = Path(__file__).resolve().parents[1] / "seerseg_data" / "splits" / "hippocampus.json"
STYLES = (
    "formal_task",
    "abbr_or_short",
    "messy_or_misspelled",
    "clinical_request",
    "report_style",
    "verbose_request",
    "lay",
    "negated",
)
PARAPHRASES = {
    "anterior hippocampus": (
        "Segment the anterior hippocampus.",
        "ant hipp",
        "plz outlne teh anteror hipocampus",
        "Contour the hippocampal head for the memory clinic work-up.",
        "Volumetry requested. Structure: hippocampus, pars anterior.",
        "Thank you for seeing this patient again. Could you please be so kind as to delineate for me the whole of the anterior part "
        "of the hippocampus?",
        "the front part of the hippocampus",
        "the hippocampus, but not its posterior part",
    ),
    "posterior hippocampus": (
        "Segment the posterior hippocampus.",
        "post hipp",
        "plz outlne teh posteror hipocampus",
        "Contour the hippocampal tail and body for the memory clinic work-up.",
        "Volumetry requested. Structure: hippocampus, pars posterior.",
        "Thank you for seeing this patient again. Could you please be so kind as to delineate for me the whole of the posterior part "
        "of the hippocampus?",
        "the back part of the hippocampus",
        "the hippocampus, but not its anterior part",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True, help="the dataset folder")
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument("--limit", type=int, default=None, help="only so many cases")
    parser.add_argument("--segmenter", default="nano")
    parser.add_argument("--reasoners", nargs="+", default=["verbatim", "lexicon"])
    arguments = parser.parse_args()

    dataset = open_dataset(arguments.raw)
    splits = json.loads(SPLIT.read_text(encoding="utf-8"))
    cases = splits["test"] if arguments.split == "test" else splits["folds"][0]["val"]
    cases = cases[: arguments.limit]
    rows = [("label prompts", Predictor(segmenter=arguments.segmenter, reasoner="verbatim"), {name: (name,) for name in PARAPHRASES})]
    rows += [(f"free text, {name}", Predictor(segmenter=arguments.segmenter, reasoner=name), PARAPHRASES) for name in arguments.reasoners]
    subjects = {dataset.subject_of[case] for case in cases}
    print(f"MSD hippocampus, {arguments.split} cases: {len(cases)} of {len(subjects)} subjects; segmenter {arguments.segmenter}")
    print("bank none; seed 0")
    print(f"paraphrases per case and target: {len(STYLES)} ({', '.join(STYLES)})")
    heads = ("requests", "target", "n", "Dice (95 % by subject)", "worst", "std", "variance", "NSD 1 mm", "no mask")
    print("{:22} {:22} {:>4}  {:26} {:>6} {:>6} {:>9} {:>9} {:>8}".format(*heads))
    by_style: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, predictor, asked in rows:
        for target, texts in asked.items():
            report(name, target, texts, predictor, dataset, cases, by_style)
    print("\nmean Dice by style")
    for name, styles in by_style.items():
        print(f"  {name:22} " + "  ".join(f"{style} {np.mean(values):.3f}" for style, values in styles.items()))


def report(name, target, texts, predictor, dataset, cases, by_style) -> None:  # type: ignore[no-untyped-def]
    means, worst, std, variance, surface, missing = defaultdict(list), [], [], [], [], 0
    for case in cases:
        files = dataset.cases[case]
        volume = read_volume(files.images[0], modality="MR")
        labels, _ = read_labels(files.label, like=volume.grid)
        reference = np.isin(labels, dataset.labels[target])
        scores = []
        for style, prediction in zip(STYLES, predictor.predict(volume, list(texts)), strict=False):
            drawn = prediction.mask.array if prediction.mask is not None else np.zeros_like(reference)
            scores.append(dice(drawn, reference) or 0.0)
            surface.append(nsd(drawn, reference, volume.grid, 1.0) or 0.0)
            missing += not drawn.any()
            if len(texts) > 1:
                by_style[name][style].append(scores[-1])
        spread = over_paraphrases(scores)
        means[dataset.subject_of[case]].append(spread.mean)
        worst.append(spread.worst)
        std.append(spread.std)
        variance.append(spread.variance)
    mean = np.mean([v for values in means.values() for v in values])
    interval = bootstrap_interval(means)
    shown = f"{mean:.3f} ({interval.lo:.3f} to {interval.hi:.3f})" if interval else f"{mean:.3f}"
    print(
        f"{name:22} {target:22} {len(cases):4}  {shown:26} {np.mean(worst):6.3f} {np.mean(std):6.3f} {np.mean(variance):9.5f} "
        f"{np.mean(surface):9.3f} {missing:8}"
    )


if __name__ == "__main__":
    main()
