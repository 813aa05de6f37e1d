"""The list of bundle kinds. Importing it imports no framework and no template engine."""

from edgebuild.bundle import BundleKind
from edgebuild.bundles import folder, ios, onnx

BUNDLES: dict[str, BundleKind] = {
    "ios": ios,
    "onnx": onnx,
    "folder": folder,
}
