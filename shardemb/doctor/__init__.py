"""What is installed here, whether it fits together, and what to type where it does not.

Needs the standard library only, and changes nothing. Libraries are tried in processes of their own,
so that one that is missing, raises, crashes or hangs is a finding.
"""

from shardemb.doctor.diagnosis import diagnose, main
from shardemb.doctor.finding import Finding, report
from shardemb.doctor.machine import check_devices, check_launcher, check_native, check_threads
from shardemb.doctor.memory import check_allocator, check_exchange, check_huge_pages
from shardemb.doctor.probes import Probe, Torch, check_imports, probe
from shardemb.doctor.versions import check_python, check_versions

__all__ = [
    "Finding",
    "Probe",
    "Torch",
    "check_allocator",
    "check_devices",
    "check_exchange",
    "check_huge_pages",
    "check_imports",
    "check_launcher",
    "check_native",
    "check_python",
    "check_threads",
    "check_versions",
    "diagnose",
    "main",
    "probe",
    "report",
]
