"""What the training scripts of the shipped `nano` models share: labelled items, cuts from them, pictures, requests, exams.

Used by scripts alone (`train_nano_*.py`, `train_smol_reasoner.py`); no command of SeerSeg imports it, so its modules may import
torch at their top. Each imports only from those before it:

    runs        log, checkpoints, schedule and options that the training loops have in common
    chest_rule  lungs, airways, spine and ribs of a chest CT by thresholds and position
    items       labelled scans in memory: where they come from, their body box, intensities and coarser copies
    cuts        what is read from an item on a grid: as it is, or deformed and degraded
    text_views  cuts with questions in words, for the text network
    clicking    cuts with one target and a simulated user, for the click network
    pictures    slices of an item as a reasoner sees them, and the file they are kept in
    lessons     requests with their replies, drawn from pictures, vocabulary and sentences
    exams       requests with known answers on held pictures, and how a reasoner is marked
    nano_vlm    the nano reasoner: tokeniser, model, and a loss that shares the prefix of a group
    smol_vlm    the smol reasoner: a language model that is given eyes

Every function that draws takes its generator; the same seed, items and release of NumPy and torch give the same draws. One thing cannot be
seeded: which merges the tokeniser leaves out (`nano_vlm.Encoder`).
"""
