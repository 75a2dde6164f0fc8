"""What messages of realtime sessions ask for and report."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.call import ANYBODY, Caller, Usage, UsageDetails
from tidegate.errors import Forbidden, InvalidRequest
from tidegate.realtime.events import (
    GeminiEvents,
    OpenAIEvents,
    Setup,
    add_usage,
    event_id_of,
    gemini_usage,
    openai_usage,
)

AUDIO = '{"type":"input_audio_buffer.append","audio":"' + "A" * 6_400 + '"}'


def text(event: Any) -> str:
    return orjson.dumps(event).decode()


def events(caller: Caller = ANYBODY) -> OpenAIEvents:
    return OpenAIEvents(caller, "fast", "gpt-realtime-2")


def test_a_message_that_names_no_model_passes_as_it_is() -> None:
    raw = '{ "type" : "conversation.item.create", "item": {"type": "message"} }'
    assert events().client_event(raw).message is raw
    assert events().client_event(raw.encode()).message == raw.encode()
    asked = events().client_event(AUDIO)
    assert (asked.message, asked.begins_turn, round(asked.about_tokens)) == (AUDIO, False, 1)
    assert events().client_event('{"type":"response.create"}').begins_turn


def test_a_message_of_too_many_values_is_not_parsed() -> None:
    many = '{"event_id":"e1","type":"session.update","session":{"i":[%s]}}'
    for read_by in (events(), GeminiEvents()):
        with pytest.raises(InvalidRequest, match="too many values"):
            read_by.client_event(many % ",".join(["{}"] * 60_000))
    listed = many % ",".join(["{}"] * 20_000)
    assert events().client_event(listed).message == listed
    long = many % f'"{"," * 70_000}"'
    assert events().client_event(long).message == long, "commas of a text are no values"
    assert event_id_of(long) == event_id_of(many % "1") == "e1"
    assert event_id_of('{"a":"%s","event_id":"e1"}' % ("x" * 70_000)) is None


def test_seconds_of_sound_are_counted_in_the_form_that_the_provider_says() -> None:
    second, heard = "A" * 64_000, events()  # of 16-bit PCM at 24 kHz, in base64
    append = text({"type": "input_audio_buffer.append", "audio": second})
    assert heard.client_event(append).audio_seconds == pytest.approx(1)
    assert heard.client_event(append.encode()).audio_seconds == pytest.approx(1)
    escaped = append.replace('"audio"', '"\\u0061udio"')
    assert heard.client_event(escaped).audio_seconds == pytest.approx(1)
    said = {"type": "message", "content": [{"type": "input_audio", "audio": second}]}
    created = text({"type": "conversation.item.create", "item": said})
    assert heard.client_event(created).audio_seconds == pytest.approx(1)
    assert heard.client_event('{"type":"response.create"}').audio_seconds == 0
    for session in (
        {"input_audio_format": "g711_ulaw"},
        {"audio": {"input": {"format": {"type": "audio/pcma"}}}},
    ):
        heard.client_event(
            text({"type": "session.update", "session": {"input_audio_format": "pcm16"}})
        )
        heard.reported(text({"type": "session.updated", "session": session}))
        assert heard.client_event(append).audio_seconds == pytest.approx(6)
    updated = {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 24_000}}}}
    heard.reported(text({"type": "session.updated", "session": updated}))
    assert heard.client_event(append).audio_seconds == pytest.approx(1)


def test_seconds_of_sound_in_the_input_of_a_response_are_counted() -> None:
    said = {"type": "message", "content": [{"type": "input_audio", "audio": "A" * 64_000}] * 2}
    response = {"conversation": "none", "input": [said, {"type": "item_reference", "id": "a"}]}
    asked = events().client_event(text({"type": "response.create", "response": response}))
    assert asked.begins_turn
    assert asked.audio_seconds == pytest.approx(2)


def test_seconds_of_sound_count_in_the_longest_form_until_a_requested_one_is_answered() -> None:
    heard, pcm = events(), {"audio": {"input": {"format": {"type": "audio/pcm", "rate": 24_000}}}}
    append = text({"type": "input_audio_buffer.append", "audio": "A" * 64_000})
    phone = {"input_audio_format": "g711_ulaw"}

    def seconds() -> float:
        return round(heard.client_event(append).audio_seconds, 3)

    heard.client_event(text({"type": "session.update", "event_id": "a", "session": phone}))
    assert seconds() == 6, "it may be in force by then"
    heard.client_event(text({"type": "session.update", "event_id": "b", "session": pcm}))
    assert seconds() == 6
    for _ in range(100):
        heard.client_event(text({"type": "session.update", "session": pcm}))
    assert seconds() == 6
    heard.reported(text({"type": "error", "error": {"event_id": "other"}}))
    heard.reported(text({"type": "session.updated", "session": phone}))
    heard.reported(text({"type": "session.updated", "session": pcm}))
    assert seconds() == 1
    heard.client_event(text({"type": "session.update", "event_id": "c", "session": phone}))
    heard.reported(text({"type": "error", "error": {"event_id": "c", "message": "no"}}))
    assert seconds() == 1


_SOUND = {"mimeType": "audio/pcm;rate=16000", "data": "A" * 64_000}
_TOOL = {"id": "1", "name": "a", "response": {"audio": _SOUND}}


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        ({"clientContent": {"turns": [{"parts": [{"inlineData": _SOUND}] * 2}]}}, 3),
        ({"client_content": {"turns": [{"parts": [{"inline_data": _SOUND}]}]}}, 1.5),
        ({"toolResponse": {"functionResponses": [{"parts": [{"inlineData": _SOUND}]}]}}, 1.5),
        ({"toolResponse": {"functionResponses": [_TOOL]}}, 0),
        ({"clientContent": {"turns": [{"parts": [{"text": "A" * 64_000}]}]}}, 0),
    ],
)
def test_seconds_of_sound_in_contents_for_gemini_are_counted(message: Any, seconds: float) -> None:
    assert GeminiEvents().client_event(text(message)).audio_seconds == pytest.approx(seconds)


def test_of_two_types_of_a_piece_the_longer_one_counts() -> None:
    blob = f'"mimeType":"audio/pcm;rate=48000","mimeType":"audio/pcm","data":"{"A" * 64_000}"'
    raw = '{"realtimeInput":{"audio":{' + blob + "}}}"
    assert GeminiEvents().client_event(raw).audio_seconds == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ({"audio": {"data": "A" * 64_000, "mimeType": "audio/pcm;rate=24000"}}, 1),
        ({"audio": {"data": "A" * 64_000}}, 1.5),
        ({"audio": {"data": "A" * 64_000, "mime_type": "Audio/PCM; Rate=900000"}}, 0.5),
        ({"mediaChunks": [{"data": "A" * 64_000, "mimeType": "audio/pcm;rate=16000"}] * 2}, 3),
        ({"video": {"data": "A" * 64_000, "mimeType": "image/jpeg"}}, 0),
        ({"text": "hello"}, 0),
    ],
)
def test_seconds_of_sound_for_gemini_are_counted_by_each_piece(given: Any, seconds: float) -> None:
    for message in (text({"realtimeInput": given}), text({"realtime_input": given}).encode()):
        assert GeminiEvents().client_event(message).audio_seconds == pytest.approx(seconds), (
            message[:80]
        )


def test_the_model_of_a_session_stays_as_it_is_under_the_name_of_its_upstream() -> None:
    named = {"type": "session.update", "session": {"model": "fast", "voice": "marin"}}
    asked = orjson.loads(events().client_event(text(named)).message)
    assert asked["session"] == {"model": "gpt-realtime-2", "voice": "marin"}
    for place in ({"session": {"model": "o9"}}, {"response": {"model": "o9"}}):
        with pytest.raises(InvalidRequest) as refused:
            events().client_event(text({"type": "session.update", **place}))
        assert refused.value.allowed == "fast"


def test_a_transcript_is_made_by_a_model_that_the_tenant_may_use() -> None:
    wanted = {"audio": {"input": {"transcription": {"model": "whisper-1"}}}}
    update = text({"type": "session.update", "session": wanted})
    some = Caller(models=("gpt-realtime-*",))
    with pytest.raises(Forbidden) as refused:
        events(some).client_event(update)
    assert refused.value.field == "session.audio.input.transcription.model"
    anyone = events()
    assert anyone.client_event(update).message == update
    done = {
        "type": "conversation.item.input_audio_transcription.completed",
        "usage": {"type": "duration", "seconds": 2.3},
    }
    (spent,) = anyone.reported(text(done)).spent
    assert (spent.model, spent.ends_turn) == ("whisper-1", False)
    assert spent.usage.details == UsageDetails(input_audio_seconds=3)


def test_each_transcript_of_a_session_that_only_transcribes_is_a_turn_of_its_model() -> None:
    some = OpenAIEvents(Caller("acme", models=("fast",)), "fast", "whisper-x", transcribes=True)
    assert some.client_event('{"type":"input_audio_buffer.commit"}').begins_turn
    assert not some.client_event('{"type":"response.create"}').begins_turn
    for model in ("fast", None):
        named = {"input_audio_transcription": {"model": model}}
        message = some.client_event(
            text({"type": "transcription_session.update", "session": named})
        )
        told = orjson.loads(message.message)["session"]["input_audio_transcription"]
        assert told == {"model": "whisper-x"}
    for wrong in ("gpt-4o-transcribe", 5):
        other = {"input_audio_transcription": {"model": wrong}}
        with pytest.raises(InvalidRequest):
            some.client_event(text({"type": "session.update", "session": other}))
    kind = "conversation.item.input_audio_transcription"
    assert some.reported(text({"type": f"{kind}.delta", "delta": "a"})).about_tokens
    failed = some.reported(text({"type": f"{kind}.failed", "error": {}}))
    assert (failed.ends_turn, failed.spent) == (True, [])
    usage = {"type": "tokens", "input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    (spent,) = some.reported(text({"type": f"{kind}.completed", "usage": usage})).spent
    assert (spent.model, spent.ends_turn, spent.usage.input_tokens) == (None, True, 3)


def test_names_of_tools_and_their_arguments_choose_no_model() -> None:
    tool = {"name": "order", "parameters": {"properties": {"model": {"type": "string"}}}}
    update = text({"type": "session.update", "session": {"tools": [tool]}})
    assert events().client_event(update).message == update


@pytest.mark.parametrize(
    "raw",
    [
        '{"type":"input_audio_buffer.append","type":"session.update","session":{"model":"o9"}}',
        '{"type":"input_audio_buffer.append","Type":"session.update","session":{"model":"o9"}}',
        '{"\\u0074ype":"session.update","type":"input_audio_buffer.append","audio":""}',
        '{"type":"session.update","session":{"voice":"a"},"session":{"model":"o9"}}',
        '{"type":"session.update","session":{"Model":"o9"}}',
        '{"type":"session.update","session":{"model":7}}',
        '{"type":7}',
        '[{"type":"session.update"}]',
        "{" * 100_000,
        "not JSON",
        '{"type": NaN}',
        '{"type":"session.update","session":{"instructions":"half of it: \\ud83d"}}',
        '{"type":"a","seed":18446744073709551616}',
        '{"type":"a","b":' + '{"c":' * 300 + "1" + "}" * 301,
    ],
)
def test_what_two_servers_could_read_differently_is_refused(raw: str) -> None:
    for message in (raw, raw.encode()):
        with pytest.raises(InvalidRequest):
            events().client_event(message)


def test_usage_is_read_at_its_place_alone() -> None:
    usage = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}
    done = {"type": "response.done", "response": {"usage": usage}}
    (spent,) = events().reported(text(done)).spent
    assert spent.usage == Usage(9, 4, total_tokens=13)
    echoed = {"type": "conversation.item.added", "item": {"content": [done]}}
    assert events().reported(text(echoed)).spent == []
    quoted = {"type": "response.output_text.delta", "delta": text(done)}
    assert events().reported(text(quoted)).spent == []
    cancelled = {"type": "response.done", "response": {"usage": None}}
    assert events().reported(text(cancelled)).ends_turn


@pytest.mark.parametrize("place", ["event_id", "text", "name", "metadata", "type"])
def test_no_text_in_an_event_hides_its_usage(place: str) -> None:
    """A client can have its model begin an answer with `.delta`, or write that into metadata."""
    written = dict.fromkeys(("event_id", "text", "name"), "quiet") | {place: "a.delta"}
    item = {"content": [{"type": "output_text", "text": written["text"]}], "name": written["name"]}
    usage = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}
    noted = {place: ".delta"} if place in ("metadata", "type") else {}
    response = {"metadata": noted, "output": [item], "usage": usage}
    events_of_it: list[Any] = [
        {"event_id": written["event_id"], "type": "response.done", "response": response},
        {"type": "response.done", "event_id": written["event_id"], "response": response},
        {"response": response, "type": "response.done"},
    ]
    for event in events_of_it:
        for message in (text(event), orjson.dumps(event)):
            reported = events().reported(message)
            assert [one.usage for one in reported.spent] == [Usage(9, 4, total_tokens=13)]
            assert reported.ends_turn
    error = {"type": "error", "error": {"message": "unknown: 'x.delta'", "event_id": "e1"}}
    assert events().reported(text(error)).about == "e1"
    last: Any = {"delta": "a", "type": "response.output_text.delta"}
    for message in (text(last), orjson.dumps(last)):
        assert events().reported(message).about_tokens


def test_cached_audio_is_charged_as_cached_and_not_as_audio_once_more() -> None:
    usage = openai_usage(
        {
            "input_tokens": 1_000,
            "output_tokens": 60,
            "input_token_details": {
                "text_tokens": 400,
                "audio_tokens": 600,
                "cached_tokens": 500,
                "cached_tokens_details": {"text_tokens": 0, "audio_tokens": 500},
            },
            "output_token_details": {"text_tokens": 10, "audio_tokens": 50},
        }
    )
    details = UsageDetails(input_audio_tokens=100, output_audio_tokens=50)
    assert usage == Usage(1_000, 60, cached_tokens=500, details=details)


@pytest.mark.parametrize("wrong", [None, 7, {}, {"input_tokens": -1}, {"input_tokens": True}])
def test_a_usage_that_is_none_is_unknown(wrong: Any) -> None:
    assert openai_usage(wrong) is None
    assert gemini_usage(wrong) is None


def test_gemini_reports_a_turn_with_what_its_tools_gave() -> None:
    told = {
        "promptTokenCount": 40,
        "toolUsePromptTokenCount": 2,
        "responseTokenCount": 7,
        "totalTokenCount": 49,
        "promptTokensDetails": [
            {"modality": "TEXT", "tokenCount": 10},
            {"modality": "AUDIO", "tokenCount": 30},
        ],
        "responseTokensDetails": [{"modality": "AUDIO", "tokenCount": 7}],
    }
    message = orjson.dumps({"serverContent": {"turnComplete": True}, "usageMetadata": told})
    (spent,) = GeminiEvents().reported(message).spent
    details = UsageDetails(input_audio_tokens=30, output_audio_tokens=7)
    assert spent.usage == Usage(42, 7, total_tokens=49, details=details)
    assert add_usage(spent.usage, Usage(1, 1)) == Usage(43, 8, total_tokens=49, details=details)


def test_geminis_messages_are_one_of_three_after_the_setup() -> None:
    live = GeminiEvents()
    turn = {"turns": [], "turnComplete": True}
    assert live.client_event(text({"clientContent": turn})).begins_turn
    assert live.client_event(text({"client_content": {"turn_complete": True}})).begins_turn
    assert not live.client_event(text({"clientContent": {"turns": []}})).begins_turn
    assert live.client_event(text({"toolResponse": {}})).begins_turn
    wrongs: list[Any] = [{"setup": {"model": "other"}}, {}, {"realtimeInput": {}, "setup": {}}]
    for wrong in wrongs:
        with pytest.raises(InvalidRequest):
            live.client_event(text(wrong))
    with pytest.raises(InvalidRequest):
        live.client_event('{"realtimeInput":{},"Setup":{}}')


def test_words_and_the_end_of_the_client_s_part_begin_a_turn_of_gemini() -> None:
    some = GeminiEvents()

    def begins(**given: Any) -> bool:
        asked = some.client_event(text({"realtimeInput": given}))
        assert asked.joins or not asked.begins_turn
        return asked.begins_turn

    assert begins(text="hello")
    assert not begins(audio={"data": "A" * 64, "mimeType": "audio/pcm"})
    assert not begins(audioStreamEnd=True)
    assert not begins(activityStart={})
    assert not begins(text="and")
    assert begins(activityEnd={})
    assert begins(text="then")


def test_a_setup_names_the_model_first_and_at_most_one_session() -> None:
    setup = Setup.of(text({"setup": {"model": "models/fast", "tools": []}}))
    assert setup.model == "fast"
    passed = orjson.loads(setup.message("models/gemini-live-2.5"))
    assert passed == {"setup": {"model": "models/gemini-live-2.5", "tools": []}}
    short = "publishers/google/models/fast"
    for name in (short, f"projects/p/locations/l/{short}"):
        assert Setup.of(text({"setup": {"model": name}})).model == "fast"
    handles: dict[str, Any] = {"sessionResumption": {"handle": "a"}}
    assert Setup.of(text({"setup": {"model": "models/m"} | handles})).handle is not None
    resumed = {"setup": {"model": "m", "session_resumption": {"handle": "b"}} | handles}
    nameless: list[Any] = [{"setup": {}}, {"clientContent": {}}, {"setup": {"model": "models/"}}]
    for wrong in (resumed, *nameless):
        with pytest.raises(InvalidRequest):
            Setup.of(text(wrong))


APPEND = "input_audio_buffer.append"


def test_no_message_passes_for_sound_by_a_word_that_it_has() -> None:
    some = events(Caller("acme", models=("gpt-realtime-*",)))
    assert some.client_event(text({"type": "response.create", "event_id": APPEND})).begins_turn
    other = {"input_audio_transcription": {"model": "gpt-4o-transcribe"}}
    with pytest.raises(Forbidden):
        some.client_event(text({"type": "session.update", "event_id": APPEND, "session": other}))
    turn = {"turns": [{"parts": [{"text": "realtimeInput"}]}], "turnComplete": True}
    assert GeminiEvents().client_event(text({"clientContent": turn})).begins_turn
    for name in ("clientContent", "toolResponse", "realtime_input"):
        both = text({"realtimeInput": {"text": "a"}, name: {"turnComplete": True}})
        with pytest.raises(InvalidRequest):
            GeminiEvents().client_event(both)


def test_names_that_only_a_lenient_server_reads_are_refused() -> None:
    """Such as names without quotes or in single ones: sound under them would count for nothing."""
    for wrong in (
        '{"realtimeInput":{audio:{data:"AAAA"}},"data":""}',
        """{"realtimeInput":{'audio':{'data':"AAAA"}},"data":""}""",
        '{"realtimeInput":{"audio":{"data":"AAAA"},text:"hello"}}',
    ):
        with pytest.raises(InvalidRequest):
            GeminiEvents().client_event(wrong)
    sound = '{"type":"input_audio_buffer.append","audio":"AAAA",response:{"model":"gpt-5"}}'
    with pytest.raises(InvalidRequest):
        events().client_event(sound)


def test_words_and_pictures_for_gemini_count_as_such() -> None:
    live = GeminiEvents()
    words = text({"realtimeInput": {"text": "tide " * 2_000}})
    assert live.client_event(words).about_tokens >= 2_500
    sound = {"mimeType": "audio/pcm;rate=16000", "data": "A" * 64_000}
    heard = live.client_event(text({"realtimeInput": {"audio": sound}}))
    assert heard.about_tokens == heard.audio_seconds * 25 == 37.5
    picture = {"mimeType": "image/jpeg", "data": "A" * 1_000}
    assert live.client_event(text({"realtimeInput": {"video": picture}})).about_tokens == 258
    assert (
        live.client_event(text({"realtimeInput": {"mediaChunks": [picture]}})).about_tokens == 258
    )


def test_sound_counts_by_its_length_whatever_its_format() -> None:
    some = events()
    form = {"audio": {"input": {"format": {"type": "audio/pcmu"}}}}
    some.reported(text({"type": "session.updated", "session": form}))
    for spelt in ('{"type":"%s","audio":"%s"}', '{"type":"%s","event_id":"\\u0061","audio":"%s"}'):
        heard = some.client_event(spelt % (APPEND, "A" * 32_000))
        assert (heard.audio_seconds, heard.about_tokens) == (3.0, 30.0)
