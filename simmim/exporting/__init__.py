"""Models for other libraries: each format a file, written and read back by the library whose format it is."""

from simmim.exporting.format import Format
from simmim.exporting.hf_folder import HF
from simmim.exporting.official_file import OFFICIAL
from simmim.exporting.onnx_file import ONNX
from simmim.exporting.simmim_file import SAFETENSORS
from simmim.exporting.timm_folder import TIMM
from simmim.exporting.torchvision_file import TORCHVISION

__all__ = ["FORMATS"]

FORMATS: dict[str, Format] = {form.name: form for form in (TIMM, HF, TORCHVISION, OFFICIAL, SAFETENSORS, ONNX)}
"""What `format=…` may be."""
