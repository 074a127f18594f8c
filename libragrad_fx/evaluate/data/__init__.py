"""Sets of pictures and texts, read one sample at a time, by name.

========================  ==============================================================  ================
``open_data(...)``        what lies there                                                 masks
========================  ==============================================================  ================
``folder:ROOT``           ``CLASS/x.jpg`` or ``x.jpg``; ``images/`` beside ``masks/``      ``masks/…/x.png``
``imagenet:ROOT@val``     ``val/WNID/x.JPEG``, or ``val/x.JPEG`` with labels beside        none
``imagenet-s:ROOT``       ``validation-segmentation/WNID/x.png``, pictures by name         by class
``imagenet-hard:WHERE``   as ``hf``; the first of several labels                           none
``mura:ROOT@valid``       ``valid/XR_WRIST/patient1/study1_positive/image1.png``           none
``pet:ROOT@trainval``     ``oxford-iiit-pet/images`` and ``annotations``                   the animal
``coco:ROOT@train2017``   ``annotations/instances_train2017.json``; zebra and elephant     by class
``hf:WHERE@SPLIT``        a folder of ``datasets``, parquet files, or a name on the hub    none
``csv:FILE`` (tsv, jsonl) texts and labels in columns                                      none
``package.module:name``   a function that returns ``Data``                                 its own
========================  ==============================================================  ================

LibraGrad's sets are ``hf:mrm8488/ImageNet1K-val@train``, ``imagenet-hard:``,
``hf:KhalfounMehdi/MURA@train`` and ``hf:timm/oxford-iiit-pet@train``, each
``selected(data, 1000, 43, "rgb")``; its segmentation is ``selected(imagenet_s(...), 5000, 42)``.

A loader's other arguments (columns, classes, what values of masks mean) are given in a mapping,
``{"load": "hf", "args": {"where": ..., "content": "sentence"}}``. Nothing is downloaded but by ``hf``; what
is missing is answered by how to get it.
"""

from __future__ import annotations

from libragrad_fx.evaluate.data.coco import coco
from libragrad_fx.evaluate.data.folders import folder, imagenet, imagenet_s, mura, pet
from libragrad_fx.evaluate.data.hub import hugging_face, imagenet_hard
from libragrad_fx.evaluate.data.items import Data, Item, Parts, Stored
from libragrad_fx.evaluate.data.names import LOADERS, open_data
from libragrad_fx.evaluate.data.prepare import covering, geometry, largest, prepared
from libragrad_fx.evaluate.data.selection import KEEP, Selection, selected
from libragrad_fx.evaluate.data.tables import table

__all__ = [
    "KEEP", "LOADERS", "Data", "Item", "Parts", "Selection", "Stored", "coco", "covering", "folder",
    "geometry", "hugging_face", "imagenet", "imagenet_hard", "imagenet_s", "largest", "mura", "open_data",
    "pet", "prepared", "selected", "table",
]  # fmt: skip
