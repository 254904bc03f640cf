"""SEER-Loop: a skill bank that evolves on training cases and is accepted on bank cases; never on validation or test."""
