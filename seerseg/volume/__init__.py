"""Grids, volumes, masks, and the files they come from and go to. The only owner of affines, nibabel and SimpleITK."""

from seerseg.volume.files import (
    IMAGE_ENDINGS,
    PICTURE_ENDINGS,
    image_stem,
    is_image,
    read_case,
    read_channels,
    read_grid,
    read_labels,
    read_segmentation_names,
    read_volume,
    write_labels,
    write_volume,
)
from seerseg.volume.grid import Grid, Mask, SourceGeometry, Volume, intensity_percentiles
from seerseg.volume.itk import write_empty_metaimage, write_metaimage
from seerseg.volume.nifti import read_legend, unplaced_source
from seerseg.volume.orientation import source_of
from seerseg.volume.resampling import resample
from seerseg.volume.runs import decode_runs, encode_runs

__all__ = [
    "IMAGE_ENDINGS",
    "PICTURE_ENDINGS",
    "Grid",
    "Mask",
    "SourceGeometry",
    "Volume",
    "decode_runs",
    "encode_runs",
    "image_stem",
    "intensity_percentiles",
    "is_image",
    "read_case",
    "read_channels",
    "read_grid",
    "read_labels",
    "read_legend",
    "read_segmentation_names",
    "read_volume",
    "resample",
    "source_of",
    "unplaced_source",
    "write_empty_metaimage",
    "write_labels",
    "write_metaimage",
    "write_volume",
]
