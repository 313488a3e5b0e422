"""Faces: from disk, aligned, or drawn by the package itself."""

from idloss.data.celeba import celeba_faces
from idloss.data.faces import AlignedFaces, Faces, FileFaces, align_all
from idloss.data.files import DataError, Fault
from idloss.data.folder import folder_faces
from idloss.data.layouts import EVALUATIONS, open_evaluation, open_faces
from idloss.data.lfw import lfw
from idloss.data.overlap import Exclusion, Match
from idloss.data.pairs import EvaluationSet, Pairs, draw_pairs
from idloss.data.preparation import prepare
from idloss.data.prepared import PreparedFaces, Report, open_prepared
from idloss.data.synthetic import draw_faces

__all__ = [
    "EVALUATIONS",
    "AlignedFaces",
    "DataError",
    "EvaluationSet",
    "Exclusion",
    "Faces",
    "Fault",
    "FileFaces",
    "Match",
    "Pairs",
    "PreparedFaces",
    "Report",
    "align_all",
    "celeba_faces",
    "draw_faces",
    "draw_pairs",
    "folder_faces",
    "lfw",
    "open_evaluation",
    "open_faces",
    "open_prepared",
    "prepare",
]
