"""The bench: verification, identification, what each protocol fixes, results and figures."""

from idloss.evaluation.calibration import Calibration, Odds, write_calibration
from idloss.evaluation.compare import compare, comparison_table
from idloss.evaluation.figures import picture_sheet, save_figure
from idloss.evaluation.folders import measure_folders
from idloss.evaluation.protocols import Protocol, get_protocol, register_protocol
from idloss.evaluation.report import paper_table, write_figures, write_sheets, write_tables
from idloss.evaluation.results import HR, Cell, Results
from idloss.evaluation.run import PAPER_SIZES, evaluate

__all__ = [
    "HR",
    "PAPER_SIZES",
    "Calibration",
    "Cell",
    "Odds",
    "Protocol",
    "Results",
    "compare",
    "comparison_table",
    "evaluate",
    "get_protocol",
    "measure_folders",
    "paper_table",
    "picture_sheet",
    "register_protocol",
    "save_figure",
    "write_calibration",
    "write_figures",
    "write_sheets",
    "write_tables",
]
