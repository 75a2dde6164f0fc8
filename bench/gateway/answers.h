/* What the upstream answers in OpenAI's dialect and in Gemini's, prepared once. */

#ifndef TIDEGATE_BENCH_ANSWERS_H
#define TIDEGATE_BENCH_ANSWERS_H

#include "wire.h"

#define FRAME_BYTES 640
#define BODY_BYTES 1024

struct text {
    char bytes[2048];
    size_t length;
};
/* OpenAI's answers, then Gemini's. The last frame comes with and without usage. */
struct dialect {
    struct text whole, first, middle, last, last_usage;
};
enum { OPENAI, GEMINI };
static struct dialect dialects[2];

static void prepare_frame(struct text *out, const char *head, const char *event) {
    char sized[FRAME_BYTES];
    snprintf(sized, sizeof sized, "%zx\r\n%s\r\n", strlen(event), event);
    out->length = (size_t)snprintf(out->bytes, sizeof out->bytes, "%s%s", head, sized);
}

static void prepare_whole(struct text *out, const char *before, const char *after) {
    char body[BODY_BYTES + 1];
    size_t text = BODY_BYTES - strlen(before) - strlen(after);
    size_t at = strlen(before);
    memcpy(body, before, at);
    for (size_t n = 0; n < text; n++) body[at++] = n % 6 == 5 ? ' ' : (char)('a' + n % 26);
    memcpy(body + at, after, strlen(after) + 1);
    out->length = (size_t)snprintf(
        out->bytes, sizeof out->bytes,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
        BODY_BYTES, body);
}

#define STREAM_HEAD                                                                               \
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
#define OPENAI_CHUNK                                                                              \
    "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1700000000," \
    "\"model\":\"bench\",\"choices\":[{\"index\":0,\"delta\":"
#define OPENAI_LAST OPENAI_CHUNK "{},\"finish_reason\":\"stop\"}]}\n\n"
#define OPENAI_USAGE                                                                              \
    "\"usage\":{\"prompt_tokens\":19,\"completion_tokens\":50,\"total_tokens\":69}}"
#define GEMINI_USAGE                                                                              \
    "\"usageMetadata\":{\"promptTokenCount\":19,\"candidatesTokenCount\":50,\"totalTokenCount\":"  \
    "69},\"modelVersion\":\"bench\",\"responseId\":\"bench\"}"
#define GEMINI_CHUNK "data: {\"candidates\":[{\"content\":{\"role\":\"model\",\"parts\":[{\"text\":\""

static void prepare(void) {
    struct dialect *d = &dialects[OPENAI];
    prepare_whole(&d->whole,
                  "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1700000000,"
                  "\"model\":\"bench\",\"choices\":[{\"index\":0,\"message\":{\"role\":"
                  "\"assistant\",\"content\":\"",
                  "\"},\"finish_reason\":\"stop\"}]," OPENAI_USAGE);
    prepare_frame(&d->first, STREAM_HEAD,
                  OPENAI_CHUNK "{\"role\":\"assistant\",\"content\":\"\"},"
                               "\"finish_reason\":null}]}\n\n");
    prepare_frame(&d->middle, "",
                  OPENAI_CHUNK "{\"content\":\" some words\"},\"finish_reason\":null}]}\n\n");
    prepare_frame(&d->last, "", OPENAI_LAST "data: [DONE]\n\n");
    prepare_frame(&d->last_usage, "",
                  OPENAI_LAST "data: {\"id\":\"chatcmpl-bench\",\"object\":"
                              "\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"bench\","
                              "\"choices\":[]," OPENAI_USAGE "\n\ndata: [DONE]\n\n");
    d = &dialects[GEMINI];
    prepare_whole(&d->whole,
                  "{\"candidates\":[{\"content\":{\"role\":\"model\",\"parts\":[{\"text\":\"",
                  "\"}]},\"finishReason\":\"STOP\",\"index\":0}]," GEMINI_USAGE);
    prepare_frame(&d->middle, "", GEMINI_CHUNK " some words\"}]},\"index\":0}]," GEMINI_USAGE "\n\n");
    prepare_frame(&d->first, STREAM_HEAD,
                  GEMINI_CHUNK " some words\"}]},\"index\":0}]," GEMINI_USAGE "\n\n");
    prepare_frame(&d->last, "",
                  GEMINI_CHUNK "\"}]},\"finishReason\":\"STOP\",\"index\":0}]," GEMINI_USAGE "\n\n");
    d->last_usage = d->last;
    for (int n = 0; n < 2; n++) {
        strcat(dialects[n].last.bytes, "0\r\n\r\n");
        strcat(dialects[n].last_usage.bytes, "0\r\n\r\n");
        dialects[n].last.length += 5;
        dialects[n].last_usage.length += 5;
    }
}

#endif
