"""The benchmark's page says what the rows say; the cost model finds constants that were planted."""

from __future__ import annotations

import json

import pytest

from benchmarks.cost_model import compare, fit
from benchmarks.projection import ASSUMPTIONS, project
from benchmarks.report import render, write_report
from gemoe_ds.errors import DataError
from gemoe_ds.models.cost.layer_time import Layer, Machine

LAYER = Layer(2048, 1024, 64)


def row(suite, layer, mean_k, mode, ms, ep=1, **more):
    return {
        "suite": suite, "layer": layer, "mean_k": mean_k, "mode": mode, "shape": "olmoe",
        "tokens": 4096, "ep": ep, "ms": ms, "quartiles_ms": [ms, ms], "rounds": 3,
        "tokens_per_s": 1, "gflops_per_s": 1.0, **more,
    }  # fmt: skip


def planted(machine: Machine) -> list[dict]:
    rows = []
    for mode in ("forward", "frozen"):
        for k in (2.0, 5.1, 8.0):
            for suite, ep in (("layer", 1), ("ep", 2), ("ep", 4)):
                ms = 1e3 * machine.seconds(LAYER, 4096, k, ep, mode)
                rows.append(row(suite, "gemoe_ds", k, mode, ms, ep))
    return rows


def test_fit_finds_what_was_planted():
    machine = Machine(5e-6, 700e9, 2e-3, 1e9, shared=True)
    rows = planted(machine)
    found = fit(rows, LAYER)
    for name in ("fixed_s_per_token", "flops_per_s", "alpha_s", "bytes_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(machine, name), rel=1e-3)
    checks = [c for c in compare(found, rows, LAYER) if c["of"] == "check"]
    assert len(checks) == 6 and all(abs(c["error"]) < 0.002 for c in checks)


def test_a_link_is_what_its_plain_exchanges_take():
    machine = Machine(5e-6, 700e9, 0.0, 1e9, shared=True)
    rows, alpha, rate = planted(machine), 7e-3, 30e6
    for size in (2**10, 2**22):
        ms = 1e3 * (alpha + size / rate)
        rows.append(row("links", "plain exchange", 0.0, "x", ms, 2, link="slow", bytes=size))
    forward = 2 * machine.seconds(LAYER, 4096, 8.0, 1, "forward")
    forward += LAYER.bytes(4096, 8.0, 2) / rate + 3 * alpha  # counts, rows, and rows back
    rows.append(row("links", "gemoe_ds", 8.0, "forward", 1e3 * forward, 2, link="slow"))
    (found,) = [c for c in compare(machine, rows, LAYER) if c["of"] == "check, slow"]
    assert found["measured_ms"] == round(1e3 * forward, 1) and abs(found["error"]) < 0.001


def test_rows_that_do_not_follow_the_model_show():
    machine = Machine(5e-6, 700e9, 2e-3, 1e9, shared=True)
    rows = planted(machine)
    for r in rows:
        if r["ep"] == 4:
            r["quartiles_ms"] = [1.5 * ms for ms in r["quartiles_ms"]]
    errors = [c["error"] for c in compare(fit(rows, LAYER), rows, LAYER) if c["of"] == "check"]
    assert all(error == pytest.approx(1 / 1.5 - 1, abs=0.01) for error in errors)


def test_a_row_crosses_once():
    # k = E: every token goes to every rank, once
    assert LAYER.pairs(100, 64, 4) == pytest.approx(300)
    assert LAYER.pairs(100, 1, 4) == pytest.approx(75)  # its one expert is elsewhere 3 times in 4
    # two experts of two: 1 - 1/4 of each of the other ranks, nearly
    assert LAYER.pairs(100, 2, 2) == pytest.approx(100 * (1 - 32 * 31 / (64 * 63)))


def test_projection_gains_and_never_more_than_the_experts_saved():
    rows = project()
    assert {r["gpus"] for r in rows} >= {8, 4096}
    assert all(1 < r["speed_up"] < 1 / 0.635 for r in rows)


def results(tmp_path):
    rows = [
        row(
            "layer", "gemoe_ds", 5.1, "forward", 300.0, realised_over_ideal=0.93, router_share=0.04
        ),
        row("layer", "gemoe_ds", 8.0, "forward", 450.0, dense_rate_share=0.81),
        row("layer", "autoep", 8.0, "forward", 900.0, peak_bytes=2_000_000),
        row("layer", "router alone", 8.0, "forward", 9.0),
    ]
    data = {
        "device": "cpu", "machine": "2 x test", "threads": 2, "dtype": "bfloat16", "date": "today",
        "commit": "abc", "seconds": 60, "command": "python -m benchmarks", "rows": rows,
    }  # fmt: skip
    file = tmp_path / "bench_cpu.json"
    file.write_text(json.dumps(data))
    return file, data


def test_page_shows_ratios(tmp_path):
    file, data = results(tmp_path)
    page = write_report(file)
    assert page == file.with_suffix(".md").read_text() == render(data, "bench_cpu.png")
    assert file.with_suffix(".png").stat().st_size > 10_000
    cells = [[c.strip() for c in line.split("|")] for line in page.splitlines() if "|" in line]
    head = cells[0]
    by_name = {(line[1], line[2]): dict(zip(head, line, strict=True)) for line in cells[2:]}
    assert by_name["gemoe_ds", "5.10"]["realised / ideal"] == "0.930"
    assert by_name["gemoe_ds", "8.00"]["dense rate"] == "81%"
    assert by_name["DeepSpeed AutoEP", "8.00"]["x gemoe_ds"] == "2.00"
    assert "router alone" not in page
    assert "2 threads" in page
    assert "seconds that one thread computed" in render(data | {"clock": "cpu"}, "bench_cpu.png")


def test_page_of_the_cost_model(tmp_path):
    file, data = results(tmp_path)
    machine = Machine(5e-6, 700e9, 2e-3, 1e9, shared=True)
    data["cost_model"] = {
        "machine": machine.__dict__,
        "compared": compare(machine, planted(machine), LAYER),
        "projected": project(),
        "assumptions": ASSUMPTIONS,
        "figure": "bench_cpu_cost.png",
    }
    file.write_text(json.dumps(data))
    page = write_report(file)
    assert "700 GFLOP/s" in page and "not a measurement" in page
    assert (tmp_path / "bench_cpu_cost.png").stat().st_size > 10_000


def test_a_foreign_file_costs_one_line(tmp_path):
    file = tmp_path / "bench_cpu.json"
    file.write_text('{"rows": []}')
    with pytest.raises(DataError, match="is no benchmark result"):
        write_report(file)
    assert not file.with_suffix(".md").exists()
