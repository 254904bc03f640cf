"""Curation of data: samples, phantoms, vocabularies and splits. Imports `seerseg`, never the reverse."""
