"""Metrics over gRPC, from the call to the table."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.error_details_pb2 import RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status

from tests.support.grpc_calls import METHOD, MetricCalls, code_of, connect, log_metric
from tests.support.http import get
from tests.support.records import Records
from worker.dev.servers import ValkeyServer, free_port

ROOT = Path(__file__).parents[2]
# A process that starts from nothing, so that PYTHONPATH counts.
FRESH = [sys.executable, "-m", "worker"]
SERVICE = "analytics.v1.AnalyticsService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def calls(records: Records) -> MetricCalls:
    return MetricCalls(records)


def this_second(nanos: int = 0) -> Timestamp:
    return Timestamp(seconds=int(datetime.now(UTC).timestamp()), nanos=nanos)


async def test_accepted_metrics_become_rows(calls: MetricCalls) -> None:
    before = datetime.now(UTC)
    worker = calls.start()
    at = this_second(123_456_789)
    async with calls.channel() as channel:
        assert (await log_metric(channel, value=7)).success
        await log_metric(channel, double_value=0.25, value=3, timestamp=at)
        for _ in range(2):
            await log_metric(channel, value=-1, timestamp=at, event_id="e")
        rows = await calls.has_rows(3)
    assert [(row["value"], row["event_id"]) for row in rows] == [(-1, "e"), (0.25, None), (7, None)]
    assert rows[1]["time"] == datetime.fromtimestamp(at.seconds, UTC).replace(microsecond=123_456)
    assert before.replace(microsecond=0) <= rows[2]["time"] <= datetime.now(UTC)
    worker.terminate()
    assert await worker.wait() == 0


async def test_a_hundred_calls_one_after_the_other_are_a_hundred_rows(calls: MetricCalls) -> None:
    calls.start()
    async with calls.channel() as channel:
        for number in range(100):
            await log_metric(channel, timeout=1, value=number)
            await asyncio.sleep(0.05)
    rows = await calls.has_rows(100)
    assert [row["value"] for row in rows] == list(range(100))


async def test_wrong_messages_are_refused_and_others_go_on(calls: MetricCalls) -> None:
    calls.start()
    async with calls.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="`service_name`") as refused:
            await log_metric(channel, service_name="")
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        raw = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as garbage:
            await raw(b"\xff\xff", timeout=5)
        assert garbage.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.aio.AioRpcError) as large:
            await raw(b"\n" * 100_000, timeout=5)
        assert large.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await code_of(channel, value=1) is grpc.StatusCode.OK
    await calls.has_rows(1)


async def test_calls_are_refused_while_too_many_metrics_wait_and_accepted_when_they_are_written(
    calls: MetricCalls,
) -> None:
    worker = calls.start(METRICS_CHANNEL_BUFFER="20")
    async with calls.channel() as channel:
        async with calls.world.sql.transaction():
            await calls.world.sql.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
            codes = [await code_of(channel, value=number) for number in range(25)]
            assert codes == [grpc.StatusCode.OK] * 20 + [grpc.StatusCode.RESOURCE_EXHAUSTED] * 5
            with pytest.raises(grpc.aio.AioRpcError) as full:
                await log_metric(channel)
            status = rpc_status.from_call(full.value)  # type: ignore[arg-type]
            retry = RetryInfo()
            assert status.details[0].Unpack(retry)
            assert retry.retry_delay.ToMilliseconds() == 50

        async def is_accepted() -> bool:
            return await code_of(channel, value=100) is grpc.StatusCode.OK

        await calls.records.wait(is_accepted)
    rows = await calls.has_rows(21)
    assert [row["value"] for row in rows] == [*range(20), 100]
    assert "Traceback" not in worker.log


async def test_every_replica_takes_calls(calls: MetricCalls) -> None:
    calls.start()
    async with calls.channel() as channel:
        await log_metric(channel, value=1)
        await calls.has_rows(1)
        calls.port = free_port()
        calls.start()
        async with calls.channel() as other:
            await log_metric(other, value=2)
            await log_metric(channel, value=3)
    rows = await calls.has_rows(3)
    assert [row["value"] for row in rows] == [1, 2, 3]


async def test_a_stop_cuts_off_no_call(calls: MetricCalls) -> None:
    worker = calls.start()
    accepted: list[int] = []
    refused: list[grpc.aio.AioRpcError] = []

    async def flood(channel: grpc.aio.Channel, first: int) -> None:
        for number in range(first, first + 1_000_000):
            try:
                await log_metric(channel, value=number)
            except grpc.aio.AioRpcError as error:
                refused.append(error)
                return
            accepted.append(number)

    async with calls.channel() as channel, connect(calls.port) as watching:
        health = health_pb2_grpc.HealthStub(watching)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == SERVING
        flooding = [asyncio.create_task(flood(channel, client * 1_000_000)) for client in range(20)]
        while len(accepted) < 500:
            await asyncio.sleep(0.01)
        worker.terminate()
        assert (await watch.read()).status == NOT_SERVING
        assert await worker.wait() == 0
        await asyncio.wait_for(asyncio.gather(*flooding), 10)
    assert len(refused) == 20
    # Refused by the server, or by its host after it had ended.
    assert {error.code() for error in refused} == {grpc.StatusCode.UNAVAILABLE}
    calls.start()
    rows = await calls.has_rows(len(accepted))
    assert [row["value"] for row in rows] == sorted(accepted)


async def test_redis_away_is_shown_and_ends_by_itself(calls: MetricCalls, valkey: ValkeyServer) -> None:
    calls.world.environment["REDIS_URL"] = valkey.url
    worker = calls.start()
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    async with calls.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)

        async def states() -> list[int]:
            return [
                (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status
                for name in ("", SERVICE)
            ]

        assert await code_of(channel) is grpc.StatusCode.OK
        assert await states() == [SERVING, SERVING]
        valkey.kill()
        codes = [await code_of(channel) for _ in range(3)]
        # The first one may have been sent before the connection was found to be lost.
        assert set(codes[:1]) <= {grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE}
        assert codes[1:] == [grpc.StatusCode.UNAVAILABLE] * 2
        assert await states() == [SERVING, NOT_SERVING]
        _, health_now = await get(f"{url}/health")
        assert health_now["checks"]["grpc"]["status"] == "failing"
        valkey.start()

        async def works_again() -> bool:
            return await states() == [SERVING, SERVING]

        await calls.records.wait(works_again)
    assert await calls.has_rows(1)


async def test_a_client_that_knows_only_the_address(calls: MetricCalls) -> None:
    """It asks for the service by reflection, as grpcurl does."""
    calls.start()
    async with calls.channel():
        pass

    def call() -> bool:
        with grpc.insecure_channel(f"127.0.0.1:{calls.port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert SERVICE in database.get_services()
            pool = descriptor_pool.DescriptorPool(database)
            method = pool.FindServiceByName(SERVICE).FindMethodByName("LogMetric")
            request = message_factory.GetMessageClass(method.input_type)
            response = message_factory.GetMessageClass(method.output_type)
            log = channel.unary_unary(
                f"/{SERVICE}/{method.name}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )
            answer = log(request(service_name="s", metric_name="m", double_value=1.5), timeout=5)
            return bool(answer.success)

    assert await asyncio.to_thread(call)
    assert (await calls.has_rows(1))[0]["value"] == 1.5


async def test_a_certificate_and_the_one_that_replaces_it(calls: MetricCalls, tmp_path: Path) -> None:
    authorities = trustme.CA(), trustme.CA()
    chain, key = tmp_path / "tls.crt", tmp_path / "tls.key"

    def install(authority: trustme.CA) -> None:
        issued = authority.issue_cert("localhost")
        key.write_bytes(issued.private_key_pem.bytes())
        chain.write_bytes(b"".join(part.bytes() for part in issued.cert_chain_pems))

    def trusting(authority: trustme.CA) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(authority.cert_pem.bytes())

    install(authorities[0])
    worker = calls.start(GRPC_TLS_CERT=str(chain), GRPC_TLS_KEY=str(key))
    async with calls.channel(credentials=trusting(authorities[0])) as channel:
        await log_metric(channel)
        # Half of the new one: the old one stays in use.
        key.write_bytes(authorities[1].issue_cert("localhost").private_key_pem.bytes())
        for _ in range(2):
            async with calls.channel(credentials=trusting(authorities[0])) as another:
                await log_metric(another)
        install(authorities[1])
        async with calls.channel(credentials=trusting(authorities[1])) as renewed:
            await log_metric(renewed)
        await log_metric(channel)
    assert worker.log.count("certificate cannot be used") == 1
    assert "certificate renewed" in worker.log
    async with connect(calls.port) as plain:
        assert await code_of(plain, timeout=1) is not grpc.StatusCode.OK
    await calls.has_rows(5)


async def test_what_cannot_be_served_stops_the_start(calls: MetricCalls, tmp_path: Path) -> None:
    missing = calls.start(GRPC_TLS_CERT=str(tmp_path / "no.crt"), GRPC_TLS_KEY=str(tmp_path / "no.key"))
    issued = trustme.CA().issue_cert("localhost")
    issued.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    plain_key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    locked_key = plain_key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.key").write_bytes(locked_key)
    (tmp_path / "empty").touch()
    locked = calls.start(GRPC_TLS_CERT=str(tmp_path / "tls.crt"), GRPC_TLS_KEY=str(tmp_path / "locked.key"))
    empty = calls.start(GRPC_TLS_CERT=str(tmp_path / "empty"), GRPC_TLS_KEY=str(tmp_path / "empty"))
    half = calls.start(GRPC_TLS_KEY=str(tmp_path / "no.key"))
    without_extra = calls.start(program=FRESH, PYTHONPATH=str(_block("grpc", tmp_path)))
    wrong_files = (missing, locked, empty, half)
    assert [await worker.wait() for worker in (*wrong_files, without_extra)] == [78] * 5
    assert all("GRPC_TLS_CERT" in worker.log for worker in wrong_files)
    assert "pass phrase" not in locked.log
    assert "viewer-worker[grpc]" in without_extra.log
    calls.start()
    async with calls.channel():
        second = calls.start()
        assert await second.wait() == 1
        assert "GRPC_PORT" in second.log
    off = calls.start(program=FRESH, GRPC_PORT="0", PYTHONPATH=str(_block("grpc", tmp_path)))
    await off.wait_for_log('"started"')


async def test_a_client_with_many_connections_and_calls_hurts_nobody(calls: MetricCalls) -> None:
    few_files = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256)); "
    run = "os.execv(sys.executable, [sys.executable, '-m', 'worker', *sys.argv[1:]])"
    worker = calls.start(program=[sys.executable, "-c", few_files + run])
    url = json.loads(await worker.wait_for_log('"started"'))["url"]
    async with calls.channel() as channel:
        silent = [await asyncio.open_connection("127.0.0.1", calls.port) for _ in range(300)]
        assert set(await asyncio.gather(*(code_of(channel, 30) for _ in range(5000)))) == {grpc.StatusCode.OK}
        status, _ = await get(f"{url}/health")
        assert status == 200
    for _, writer in silent:
        writer.close()
    await calls.has_rows(5000)
    assert "Too many open files" not in worker.log


def _block(package: str, folder: Path) -> Path:
    """A folder that, on PYTHONPATH, makes the package impossible to import, as if it were not installed."""
    found = folder / "without"
    found.mkdir(exist_ok=True)
    (found / f"{package}.py").write_text(f"raise ModuleNotFoundError('no {package}', name={package!r})\n")
    return found


async def test_a_client_with_another_major_version_of_protobuf(calls: MetricCalls, tmp_path: Path) -> None:
    """Its classes come from the published file."""
    calls.start()
    described = tmp_path / "analytics.bin"
    arguments = ("--proto_path=proto", "--include_imports", f"--descriptor_set_out={described}")
    command = [sys.executable, "-m", "grpc_tools.protoc", *arguments, "analytics/v1/analytics.proto"]
    await asyncio.to_thread(subprocess.run, command, cwd=ROOT, check=True)
    async with calls.channel():
        pass
    client = [sys.executable, "-c", CLIENT, str(ROOT / ".venv" / "client"), str(described), str(calls.port)]
    answered = await asyncio.to_thread(subprocess.run, client, capture_output=True, text=True, timeout=30)
    assert answered.stdout == "5 True\n", answered.stderr
    assert (await calls.has_rows(1))[0]["value"] == 2.5


CLIENT = """
import sys
folder, described, port = sys.argv[1:]
sys.path.insert(0, folder)
import google.protobuf, grpc
from google.protobuf import descriptor_pb2, message_factory
files = descriptor_pb2.FileDescriptorSet.FromString(open(described, "rb").read())
classes = message_factory.GetMessages(files.file)
request, response = (classes[f"analytics.v1.LogMetrics{kind}"] for kind in ("Request", "Response"))
message = request(service_name="s", metric_name="m", double_value=2.5, event_id="e")
message.timestamp.GetCurrentTime()
with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
    call = channel.unary_unary(
        "/analytics.v1.AnalyticsService/LogMetric", request.SerializeToString, response.FromString
    )
    print(google.protobuf.__version__.partition(".")[0], call(message, timeout=5).success)
"""
