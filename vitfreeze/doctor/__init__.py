"""Is this cluster fit to train? Every rank takes part; one table of answers, with a cure for each that is red."""

from vitfreeze.doctor.findings import Finding, format_findings
from vitfreeze.doctor.run_checks import run_checks

__all__ = ["Finding", "format_findings", "run_checks"]
