from thunder_rollout.core.decisions import Pause, Restore
from thunder_rollout.core.events import FinishReason, Tick, TurnEnded, TurnRequested
from thunder_rollout.observe.trace import TraceWriter, read_trace

REQUESTED = TurnRequested(program="p", request="p/0", prompt_tokens=3, block_hashes=(1, 2))
RESTORED = Restore(program="p", backend="e", generation=0, request="p/0", grant=1)


def test_what_is_written_reads_back(tmp_path):
    path = tmp_path / "trace.jsonl"
    writer = TraceWriter(path)
    ended = TurnEnded(program="p", grant=1, finish_reason=FinishReason.ABORT)
    entries = [(0.5, REQUESTED, [RESTORED]), (1.0, ended, []), (2.0, Tick(), [Pause(program="p", backend="e")])]
    for entry in entries:
        writer.write(*entry)
    writer.close()
    assert read_trace(path) == entries


def test_a_resumed_trace_reads_as_its_last_session_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    first = TraceWriter(path)
    first.write(0.5, REQUESTED, [RESTORED])
    first.close()
    with path.open("a") as file:
        file.write('{"t": 1.0, "event": "Turn')
    second = TraceWriter(path)
    second.write(0.1, Tick(), [])
    second.close()
    assert read_trace(path) == [(0.1, Tick(), [])]
