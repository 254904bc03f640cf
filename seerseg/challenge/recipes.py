"""The texts of a container: Dockerfile, Apptainer definition, entry points. `container.write_container` puts them into a folder.

Layout in the image, the same for both: code in /opt/seerseg, a trained model (or none) in /opt/ml/model, where Grand-Challenge also unpacks
an uploaded model, further parts in /opt/parts, the entry point as /workspace/predict.sh. Everything but /tmp and the outputs may be
read-only; the user is not root; nothing is ever fetched.
"""

from __future__ import annotations

MARK = "# Made by seerseg_challenge dockerize."

_ENVIRONMENT = (
    ("PYTHONPATH", "/opt/seerseg"),
    ("PYTHONUNBUFFERED", "1"),
    ("PYTHONDONTWRITEBYTECODE", "1"),
    ("HF_HUB_OFFLINE", "1"),
    ("TRANSFORMERS_OFFLINE", "1"),
    ("HOME", "/tmp"),
    ("XDG_CACHE_HOME", "/tmp/cache"),
    ("HF_HOME", "/tmp/cache/huggingface"),
    ("MPLCONFIGDIR", "/tmp/cache/matplotlib"),
)
BASE = "python:3.11-slim-bookworm"
TORCH_INDEX = "none"
"""Build argument: the address of the wheels of one build of torch, as PyTorch's install page names it; "none": pip's own choice."""

_INSTALL = """\
set -eu
if [ "$TORCH_INDEX" != none ]; then
    python -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' /opt/requirements.txt)"
fi
python -m pip install --no-cache-dir -r /opt/requirements.txt
python -m pip check
if grep -q '^[^#]' /opt/packages.txt; then python -m pip install --no-cache-dir --no-deps -r /opt/packages.txt; fi"""

_SETTLE = """\
set -eu
python -m compileall -q /opt/seerseg
mkdir -p /workspace/inputs /workspace/outputs /input /output
chmod 777 /workspace/outputs /output
chmod -R a+rX /opt /workspace"""


def dockerfile() -> str:
    """The Dockerfile; the build context is the folder that it lies in, or a checkout with RECIPE=containers."""
    environment = " \\\n    ".join(f"{name}={value}" for name, value in _ENVIRONMENT)
    return f"""\
{MARK}
#   docker build --tag team .
#   docker build --tag team --build-arg TORCH_INDEX=ADDRESS .     another build of torch (CPU alone, a CUDA version): PyTorch's
#                                                                 install page names the address
# CONVENTION=npz answers /workspace/inputs into /workspace/outputs (CVPR 2025), grand_challenge answers /input into /output.
# From a checkout: docker build --tag team --build-arg RECIPE=containers --file containers/Dockerfile .
ARG BASE={BASE}
FROM ${{BASE}}
ARG CONVENTION=npz
ARG RECIPE=.
ARG TORCH_INDEX={TORCH_INDEX}
ENV {environment}
WORKDIR /workspace
COPY ${{RECIPE}}/requirements.txt ${{RECIPE}}/packages.txt /opt/
RUN {_one_line(_INSTALL)}
COPY seerseg /opt/seerseg/seerseg
COPY ${{RECIPE}}/parts /opt/parts
COPY ${{RECIPE}}/model /opt/ml/model
COPY ${{RECIPE}}/predict_${{CONVENTION}}.sh /workspace/predict.sh
RUN {_one_line(_SETTLE)}
USER 1000:1000
RUN sh /workspace/predict.sh --help
# CMD, not ENTRYPOINT: the CVPR program runs `/bin/bash -c "sh predict.sh"` in it, Grand-Challenge runs it as it is.
CMD ["sh", "/workspace/predict.sh"]
"""


def apptainer() -> str:
    """The Apptainer definition (1.2 or newer), for clusters."""
    environment = "\n".join(f"    export {name}={value}" for name, value in _ENVIRONMENT)
    return f"""\
Bootstrap: docker
From: {{{{ BASE }}}}

%arguments
    BASE={BASE}
    CONVENTION=npz
    RECIPE=.
    TORCH_INDEX={TORCH_INDEX}

%help
    {MARK.removeprefix("# ")}
    apptainer build seerseg.sif seerseg.def
    apptainer build --build-arg TORCH_INDEX=ADDRESS seerseg.sif seerseg.def     another build of torch; with CUDA run it with --nv
    apptainer run --containall --net --network none --bind IN:/workspace/inputs:ro,OUT:/workspace/outputs seerseg.sif
    From a checkout: apptainer build --build-arg RECIPE=containers seerseg.sif containers/seerseg.def

%files
    {{{{ RECIPE }}}}/requirements.txt /opt/requirements.txt
    {{{{ RECIPE }}}}/packages.txt /opt/packages.txt
    seerseg /opt/seerseg/seerseg
    {{{{ RECIPE }}}}/parts /opt/parts
    {{{{ RECIPE }}}}/model /opt/ml/model
    {{{{ RECIPE }}}}/predict_{{{{ CONVENTION }}}}.sh /workspace/predict.sh

%environment
{environment}

%post
    TORCH_INDEX={{{{ TORCH_INDEX }}}}
{_indented(_INSTALL)}
{_indented(_SETTLE)}

%runscript
    exec sh /workspace/predict.sh "$@"

%test
    sh /workspace/predict.sh --help
"""


def entry_point(convention: str, arguments: str = "") -> str:
    """The script that a challenge runs. arguments: further options of `seerseg_challenge predict`, quoted for a shell."""
    where = {"npz": "/workspace/inputs into /workspace/outputs", "grand_challenge": "/input into /output"}[convention]
    options = f" \\\n    {arguments}" if arguments else ""
    return f"""\
#!/bin/sh
{MARK}
# Answers {where}. A scan that cannot be used gets an empty answer, the reason goes to stderr, and the exit code stays 0:
# a crash would cost the submission.
set -eu
if [ -f /opt/ml/model/manifest.json ]; then
    set -- -m /opt/ml/model "$@"
fi
exec python -m seerseg.cli.challenge predict --convention {convention} --never_fail{options} "$@"
"""


PACKAGES = """\
# Further packages, one pip requirement a line, installed without their dependencies (for instance those of a segmenter).
"""
MODEL_README = """\
A trained model goes here: the folder that seerseg_train makes (manifest.json at its top), or one that seerseg_install unpacked.
Without manifest.json the shipped defaults answer. On Grand-Challenge a model that is uploaded by itself appears here, at /opt/ml/model.
"""
PARTS_README = """\
Folders that --segmenter, --reasoner or --bank name, one each; /opt/parts in the image.
"""


def _one_line(script: str) -> str:
    """A shell script as one RUN instruction."""
    lines = script.splitlines()
    joined = ""
    for line in lines:
        bare = line.strip()
        opens = bare.endswith("then")
        joined += bare + (" \\\n    " if opens else "; \\\n    ")
    return joined.rstrip(" \\\n;")


def _indented(script: str) -> str:
    return "\n".join("    " + line for line in script.splitlines())
