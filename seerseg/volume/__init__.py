"""Grids, volumes, masks, and the files they come from and go to. The only owner of affines, nibabel and SimpleITK."""

from seerseg.volume.grid import Grid, Mask, SourceGeometry, Volume, intensity_percentiles

__all__ = ["Grid", "Mask", "SourceGeometry", "Volume", "intensity_percentiles"]
