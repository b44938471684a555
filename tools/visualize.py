"""Look at data.

python -m tools.visualize samples TREE --out FILE.png      a contact sheet of persons x cameras
"""

import argparse
import random
from pathlib import Path

from PIL import Image, ImageDraw

import utils
from data_loader import read_image
from data_manager import IMAGE_SUFFIXES

CELL = (72, 160)  # pixels, width x height; every image is fitted into one
MARGIN, HEADER, GAP = 44, 16, 3
SYSU_COLUMNS = {f"cam{c}": f"cam{c} {'IR' if c in (3, 6) else 'RGB'}" for c in range(1, 7)}
REGDB_COLUMNS = {"Visible": "visible", "Thermal": "thermal"}


def folders(tree: Path) -> dict[str, str]:
    """The camera folders of a SYSU-MM01 or RegDB tree and their headings."""
    for columns in (SYSU_COLUMNS, REGDB_COLUMNS):
        if any((tree / name).is_dir() for name in columns):
            return columns
    raise OSError(f"{tree} holds neither cam1..cam6 (SYSU-MM01) nor Visible and Thermal (RegDB)")


def samples(tree: Path, persons: int, per_camera: int, seed: int) -> Image.Image:
    """Contact sheet: a row per person, `per_camera` images per camera; a missing camera leaves a grey cell."""
    rng, columns = random.Random(seed), folders(tree)
    names = {p.name for camera in columns for p in (tree / camera).glob("*") if p.is_dir()}
    order = sorted(names, key=lambda n: (len(n), n))
    chosen = sorted(rng.sample(order, min(persons, len(order))), key=lambda n: (len(n), n))
    step = (CELL[0] + GAP, CELL[1] + GAP)
    size = (MARGIN + len(columns) * per_camera * step[0], HEADER + len(chosen) * step[1])
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for c, title in enumerate(columns.values()):
        draw.text((MARGIN + c * per_camera * step[0], 2), title, "black")
    for row, name in enumerate(chosen):
        top = HEADER + row * step[1]
        draw.text((4, top + CELL[1] // 2), name, "black")
        for c, camera in enumerate(columns):
            files = sorted(p for p in (tree / camera / name).glob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            files = sorted(rng.sample(files, min(per_camera, len(files))))
            for k in range(per_camera):
                left = MARGIN + (c * per_camera + k) * step[0]
                draw.rectangle((left, top, left + CELL[0] - 1, top + CELL[1] - 1), "lightgrey")
                if k < len(files):
                    sheet.paste(Image.fromarray(read_image(str(files[k]), CELL[::-1])), (left, top))
    return sheet


def build_parser() -> argparse.ArgumentParser:
    parser = utils.Parser(
        prog="python -m tools.visualize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    sheet = commands.add_parser("samples", help="contact sheet of persons x cameras of a dataset tree")
    sheet.add_argument("tree", type=Path, help="SYSU-MM01 or RegDB root folder")
    sheet.add_argument("--out", type=Path, required=True, help="image file to write")
    sheet.add_argument("--persons", type=utils.number(int, 1), default=8, help="rows (%(default)s)")
    sheet.add_argument(
        "--per-camera", type=utils.number(int, 1, 101), default=1, help="images in each cell (%(default)s)"
    )
    sheet.add_argument("--seed", type=utils.number(int, 0), default=0, help="which persons and images (%(default)s)")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    kind = Image.registered_extensions().get(args.out.suffix.lower())
    if kind not in Image.SAVE:
        utils.fail(f"--out {args.out}: give a name that ends in .png or another image suffix")
    image = samples(args.tree, args.persons, args.per_camera, args.seed)
    utils.make_folder(str(args.out.parent), "--out")
    with utils.whole_file(str(args.out)) as partial:
        image.save(partial, kind)
    print(f"{args.out}: {image.width} x {image.height} pixels")


if __name__ == "__main__":
    utils.run(main)
