"""What a command, an import and an idle service cost."""

import resource
import statistics
import subprocess
import sys

import psutil
from stack import report, stack

RUNS = 9
COMMANDS = {
    "python": ["-c", "pass"],
    "import_dar": ["-c", "import dar"],
    "dar_help": ["-m", "dar.cli", "--help"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU time of one fresh interpreter, user and system."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def service_memory() -> tuple[float, bool]:
    """Resident MB of a service that did nothing but answer, and whether torch is mapped into it."""
    with stack(workers=0):
        services = [
            process
            for process in psutil.Process().children(recursive=True)
            if "service" in process.cmdline()
        ]
        assert len(services) == 1
        maps = {mapping.path for mapping in services[0].memory_maps()}
        return services[0].memory_info().rss / 1e6, any("/torch/" in path for path in maps)


def main() -> None:
    """Measure and report."""
    runs: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, arguments in COMMANDS.items():
            runs[name].append(cpu_seconds(arguments))
    cpu = {name: statistics.median(values) for name, values in runs.items()}
    rss_mb, has_torch = service_memory()
    report(
        "startup",
        dar_help_cpu_seconds=round(cpu["dar_help"], 3),
        import_dar_cpu_seconds_beyond_python=round(cpu["import_dar"] - cpu["python"], 3),
        idle_service_rss_mb=round(rss_mb, 1),
        service_has_torch=has_torch,
        runs=RUNS,
    )


if __name__ == "__main__":
    main()
