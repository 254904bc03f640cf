"""Work under Slurm: a site's demands, one plain script per job, its markers, and what the parts of a prediction came to."""

from seerseg.slurm.jobs import JobFolder, Sent, Standing, judge, sentences
from seerseg.slurm.merging import Merged, merge_parts
from seerseg.slurm.script import PART, Job, write_script
from seerseg.slurm.site import SITE_VARIABLE, Site, load_site

__all__ = [
    "PART",
    "SITE_VARIABLE",
    "Job",
    "JobFolder",
    "Merged",
    "Sent",
    "Site",
    "Standing",
    "judge",
    "load_site",
    "merge_parts",
    "sentences",
    "write_script",
]
