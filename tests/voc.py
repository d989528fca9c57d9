"""Boxes in VOC's XML files -> a folder for --data, with every fifth picture held out.

    python tests/voc.py XML_FOLDER PICTURE_FOLDER DATA

writes DATA/coco/annotations/instances_{train,val}2017.json, and links to the pictures.
"""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

if len(sys.argv) != 4:
    sys.exit(__doc__)
xml, pictures, folder = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) / "coco"
if not any(xml.glob("*.xml")) or not pictures.is_dir():
    sys.exit(f"no .xml file in {xml}, or no folder {pictures}\n{__doc__}")
(folder / "annotations").mkdir(parents=True, exist_ok=True)
parts, classes = {"val": ([], []), "train": ([], [])}, {}
for number, file in enumerate(sorted(xml.glob("*.xml"))):
    images, boxes = parts["train" if number % 5 else "val"]
    try:
        root = ElementTree.parse(file)
        images.append({"id": number, "file_name": root.findtext("filename"),
                       "width": int(root.findtext("size/width")),
                       "height": int(root.findtext("size/height"))})
        for thing in root.iterfind("object"):
            x0, y0, x1, y1 = [float(thing.findtext(f"bndbox/{side}"))
                              for side in ("xmin", "ymin", "xmax", "ymax")]
            label = classes.setdefault(thing.findtext("name"), len(classes))
            boxes.append({"id": len(boxes) + 1, "image_id": number, "category_id": label,
                          "bbox": [x0, y0, x1 - x0, y1 - y0]})
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        sys.exit(f"{file}: no VOC annotation with a size and boxes ({error}); mend or remove it")
categories = [{"id": label, "name": name} for name, label in classes.items()]
for split, (images, boxes) in parts.items():
    content = {"images": images, "annotations": boxes, "categories": categories}
    path = folder / f"annotations/instances_{split}2017.json"
    path.write_text(json.dumps(content))
    link = folder / f"{split}2017"
    if link.is_symlink():
        link.unlink()
    link.symlink_to(pictures.resolve())
    print(f"{path}: {len(images)} pictures, {len(boxes)} boxes, {len(categories)} classes")
