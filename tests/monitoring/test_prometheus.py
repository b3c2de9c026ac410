"""The dashboard, asked of a real Prometheus that scrapes the real command during a run."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from shmepoch.monitoring.metrics import EpochCollector
from tests.cli.running import DEADLINE_S, ended, started
from tests.cli.serving import serving, url_of, value
from tests.support import eventually

_DOCS: Final = Path(__file__).parents[2] / "docs"
_DASHBOARD: Final = _DOCS / "dashboard.json"
_PAGE: Final = _DOCS / "metrics.md"
#: How the tables of the page begin a row.
_ROW: Final = re.compile(r"^\| `(shmepoch_\w+)` \|")
_NAME: Final = re.compile(r"\bshmepoch_\w+")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_DASHBOARD.read_text())
    return found


def queries() -> list[str]:
    """What the panels ask."""
    return [
        target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())
    ]


def asked() -> set[str]:
    """The metrics that they ask for."""
    names = _NAME.findall(" ".join(queries()))
    return {re.sub("_(bucket|sum|count)$", "", name) for name in names}


def program(name: str) -> str:
    """A program that tools/setup brings where it can."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name}: tools/setup brings it where apt-get has its package")
    return found


class Prometheus:
    """A server that scrapes one address."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = psutil.Process(process.pid)
        self._port = eventually(self._find_port, within=60)
        eventually(self._is_ready, within=60)

    def _find_port(self) -> int | None:
        connections = self._process.net_connections()
        ports = [one.laddr.port for one in connections if one.status == psutil.CONN_LISTEN]
        return ports[0] if ports else None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/-/ready"):
                return True
        except urllib.error.HTTPError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        """What its API answers."""
        url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as answer:
            said = json.load(answer)
        assert said["status"] == "success"
        return said["data"]

    def ask(self, query: str) -> list[float]:
        """The values of the series that a query gives."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[Prometheus]:
    """A server on a port of its own, with all that it keeps in `folder`."""
    config = folder / "prometheus.json"  # JSON is YAML
    job = {"job_name": "shmepoch", "static_configs": [{"targets": [target]}]}
    scraped = {"scrape_interval": "1s", "scrape_timeout": "1s"}
    config.write_text(json.dumps({"global": scraped, "scrape_configs": [job]}))
    arguments = [
        program("prometheus"),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
        "--log.level=error",
    ]
    with subprocess.Popen(arguments, cwd=folder) as process:
        try:
            yield Prometheus(process)
        finally:
            process.terminate()


def test_the_dashboard_and_the_page_have_every_metric_and_no_other(namespace: str) -> None:
    registry = CollectorRegistry()
    registry.register(EpochCollector(namespace))
    exposed = set(re.findall(r"^# TYPE (\w+)", generate_latest(registry).decode(), re.M))
    exposed = {name for name in exposed if not name.endswith("_created")}
    assert asked() == exposed
    drawn = {name for line in _PAGE.read_text().splitlines() for name in _ROW.findall(line)}
    assert drawn == exposed


def test_the_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert found["uid"] == "shmepoch"
    assert [one["type"] for one in found["templating"]["list"]] == ["datasource", "query"]
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids))
    for panel in found["panels"]:
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"


def test_what_is_exposed_is_what_prometheus_recommends(namespace: str) -> None:
    with serving() as process, urllib.request.urlopen(url_of(process)) as answer:
        done = subprocess.run(
            [program("promtool"), "check", "metrics"],
            input=answer.read(),
            capture_output=True,
            check=False,
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_the_alerts_of_the_page_are_rules(tmp_path: Path) -> None:
    [rules] = re.findall(r"^```yaml\n(.*?)^```$", _PAGE.read_text(), re.M | re.S)
    assert set(_NAME.findall(rules)) <= asked()
    file = tmp_path / "rules.yaml"
    file.write_text(rules)
    done = subprocess.run(
        [program("promtool"), "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_query_of_the_dashboard_is_answered(namespace: str, tmp_path: Path) -> None:
    go = tmp_path / "go"
    jobs = "true\nfalse\n" * 3 + f"until test -e {go}; do sleep 0.1; done\n" * 2
    of_this = f'{{namespace="{namespace}"}}'
    with serving() as process:
        url = url_of(process)
        with prometheus(tmp_path, urllib.parse.urlsplit(url).netloc) as server:
            completions = f"shmepoch_completions_total{of_this}"
            eventually(lambda: server.ask(completions) == [0], within=60)
            with started("-", "--sessions", 2, stdin=jobs) as going:
                epochs = f"sum(shmepoch_epochs{of_this})"
                eventually(lambda: server.ask(epochs) == [2], within=60)
                go.touch()
                assert ended(going)[0] == 1
            # The epochs are removed by now, and what they completed last was seen all the same.
            assert value(url, "completions_total", namespace=namespace) == 8
            eventually(lambda: server.ask(completions) == [8], within=60)
            for query in queries():
                # A scrape that took too long leaves none for a moment.
                values = eventually(partial(server.ask, _filled_in(query, namespace)), within=60)
                assert not any(map(math.isnan, values)), query
            found = server.get("label/namespace/values", **{"match[]": "shmepoch_epochs"})
            assert found == [namespace]
            by_status = f"shmepoch_operation_seconds_count{of_this}"
            eventually(lambda: sorted(server.ask(by_status)) == [0, 0, 0, 0, 3, 5], within=60)
            eventually(lambda: server.ask("up") == [1], within=60)


def _filled_in(query: str, namespace: str) -> str:
    """A query with its variables replaced, as Grafana does it."""
    variables = {"$namespace": namespace, "$__rate_interval": "10m", "$__range": "10m"}
    for variable, text in variables.items():
        query = query.replace(variable, text)
    return query
