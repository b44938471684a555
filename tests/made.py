"""Makers of small input files."""

import json
from pathlib import Path

import numpy as np


def features_file(path: Path, **changes) -> Path:
    """Features of two persons in every camera; ``changes`` replaces arrays, or takes them away where None."""
    pids, camids = np.repeat([1, 2], 12), np.tile(np.repeat(np.arange(1, 7), 2), 2)
    arrays = {"pids": pids, "camids": camids, "paths": np.array([f"{i:02d}" for i in range(24)]), "fc": np.eye(24)}
    np.savez(path, **{name: values for name, values in (arrays | changes).items() if values is not None})
    return path


def result(**changes) -> str:
    """A JSON file of test.py in small; ``changes`` replaces entries."""
    mean = dict.fromkeys(("rank1", "rank5", "rank10", "rank20", "mAP", "mINP"), 0.5)
    trials = [{"trial": trial, "cmc": [0.5] * 20} for trial in (1, 2)]
    rows = [
        {"protocol": "v2t", "feature": kind, "mean": mean, "std": mean, "trials": trials} for kind in ("fc", "chance")
    ]
    counts = {"queries": 3, "without_match": 0, "gallery_images": 3, "gallery_persons": 3, "chance": 0.3}
    content = {"results": rows, "counts": {"v2t": counts}, "options": [], "flags": {"dataset": "regdb"}}
    return json.dumps(content | changes)
