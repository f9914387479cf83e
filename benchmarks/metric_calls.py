"""Measures LogMetric over gRPC, compared with a server that only answers and with an XADD a call. Run by `make bench`.

Each server is a process of its own, and the same client calls them in turn, for several rounds: first with 32 calls at
a time, then with one. Compare the ratios within a round: client, server, Redis and Postgres share the cores. The worker
also carries the metrics to Postgres meanwhile; the others do not.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import grpc
import redis.asyncio as aioredis

from worker.db import schema
from worker.db.address import parse_database_url
from worker.db.session import Database
from worker.dev.servers import PostgresServer, ValkeyServer, free_port
from worker.rpc.analytics.v1.analytics_pb2 import LogMetricsRequest, LogMetricsResponse
from worker.runtime.event_loop import run_async

SERVICE, METHOD = "analytics.v1.AnalyticsService", "LogMetric"
ROUNDS = 5
SECONDS = float(os.environ.get("BENCH_SECONDS", "3"))
AT_ONCE = (32, 1)
ECHO, XADD, WORKER = "bare echo", "XADD for each call", "viewer-worker"


async def serve(kind: str, port: int, redis_url: str) -> None:
    """A naive server, until this process is ended."""
    redis = aioredis.from_url(redis_url)

    async def log_metric(request: LogMetricsRequest, _: object) -> LogMetricsResponse:
        if kind == XADD:
            document = {
                "service_name": request.service_name,
                "metric_name": request.metric_name,
                "value": request.value,
            }
            await redis.xadd("naive", {"data": json.dumps(document)})
        return LogMetricsResponse(success=True)

    method = grpc.unary_unary_rpc_method_handler(
        log_metric, LogMetricsRequest.FromString, LogMetricsResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: method}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def call(port: int, at_once: int) -> tuple[float, float, float]:
    """Calls per second, and the median and the 99th percentile of their duration in milliseconds."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        await channel.channel_ready()
        log_metric = channel.unary_unary(
            f"/{SERVICE}/{METHOD}", LogMetricsRequest.SerializeToString, LogMetricsResponse.FromString
        )
        durations: list[float] = []
        ends = time.perf_counter() + SECONDS

        async def one_after_the_other() -> None:
            request = LogMetricsRequest(service_name="checkout", metric_name="cpu_usage", value=1)
            while (began := time.perf_counter()) < ends:
                await log_metric(request)
                durations.append(time.perf_counter() - began)

        await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))
    durations.sort()
    p50, p99 = (durations[int(len(durations) * part)] * 1000 for part in (0.5, 0.99))
    return len(durations) / SECONDS, p50, p99


async def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="viewer-worker-bench-"))
    folder.chmod(0o755)
    valkey, postgres = ValkeyServer(folder / "redis"), PostgresServer(folder / "postgres")
    valkey.start()
    postgres.start()
    ports = {name: free_port() for name in (ECHO, XADD, WORKER)}
    started: list[asyncio.subprocess.Process] = []
    try:
        database = Database(parse_database_url(postgres.url))
        await schema.upgrade(database)
        await database.close()
        environment = os.environ | {
            "REDIS_URL": valkey.url,
            "DATABASE_URL": postgres.url,
            "PIPELINES": "metrics",
            "METRICS_CHANNEL_BUFFER": "1000000",
            "GRPC_PORT": str(ports[WORKER]),
            "HEALTH_CHECK_PORT": "0",
            "LOG_LEVEL": "error",
        }
        for name, port in ports.items():
            naive = [__file__, name, str(port), valkey.url]
            arguments = ["-m", "worker", "run"] if name == WORKER else naive
            started.append(await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment))
        for at_once in AT_ONCE:
            await compare(ports, at_once)
    finally:
        for process in started:
            process.terminate()
            await process.wait()
        valkey.kill()
        postgres.kill()
        shutil.rmtree(folder, ignore_errors=True)


async def compare(ports: dict[str, int], at_once: int) -> None:
    measured: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for number in range(ROUNDS):
        names = list(ports)[number % len(ports) :] + list(ports)[: number % len(ports)]
        for name in names:
            measured[name].append(await call(ports[name], at_once))
    print(f"\n{at_once} at a time, medians of {ROUNDS} rounds:")
    for name, rounds in measured.items():
        rate, p50, p99 = (statistics.median(values) for values in zip(*rounds, strict=True))
        of_echo = [mine[0] / echo[0] for mine, echo in zip(rounds, measured[ECHO], strict=True)]
        later = [mine[2] / echo[2] for mine, echo in zip(rounds, measured[ECHO], strict=True)]
        print(
            f"  {name:20} {rate:8,.0f} calls/s, median {p50:6.2f} ms, p99 {p99:6.2f} ms;"
            f" {statistics.median(of_echo):.2f} x the calls and {statistics.median(later):.2f} x the p99 of the echo"
        )


if __name__ == "__main__":
    run_async(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3]) if len(sys.argv) > 1 else main())
